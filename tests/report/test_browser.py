import json
import shutil

import pytest

from normprop.report.html import write

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)
DRAWN = "return [...document.querySelectorAll('.plot')].map(p => [p.id, p.data ? p.data.length : 0])"
# Methods with a visible trace, over all plots that are drawn and not hidden with their panel.
VISIBLE = """
return [...new Set([...document.querySelectorAll('.panel:not([hidden]) .plot')].flatMap(
  p => (p.data || []).filter(t => t.visible).map(t => t.meta.method)))].sort((a, b) => a - b)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("Chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(make_document, tmp_path_factory):
    return write(make_document(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(driver, report):
    return opened(driver, report)


def opened(driver, path):
    """Open a report with a window so tall that every plot is near it, and wait until all are drawn."""
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    size(driver, 1280, 900)
    driver.get(path.as_uri())
    size(driver, 1280, driver.execute_script("return document.documentElement.scrollHeight"))
    unfinished = "return document.querySelectorAll('.panel:not([hidden]) .plot:empty').length"
    wait(driver, lambda d: d.execute_script(unfinished) == 0)
    return driver


def wait(page, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, 20).until(condition)


def size(driver, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def find(page, selector):
    from selenium.webdriver.common.by import By

    return page.find_elements(By.CSS_SELECTOR, selector)


def background(page):
    return page.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_opens_from_disk_without_errors_or_requests(page):
    drawn = dict(page.execute_script(DRAWN))
    assert len(drawn) == 1 + 4 + 3 + 4 + 8
    assert all(drawn.values())
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert sent, "the performance log is on and has the page itself"
    assert [url for url in sent if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_one_legend_switches_methods_in_every_plot(page):
    chips = find(page, ".chip")
    assert page.execute_script(VISIBLE) == list(range(8))
    chips[1].click()
    assert chips[1].get_attribute("aria-pressed") == "false"
    assert page.execute_script(VISIBLE) == [0, 2, 3, 4, 5, 6, 7]
    assert len(find(page, ".panel[hidden]")) == 1
    chips[1].click()
    assert page.execute_script(VISIBLE) == list(range(8))
    page.execute_script("document.querySelectorAll('.chip')[3].dispatchEvent(new MouseEvent('dblclick'))")
    assert page.execute_script(VISIBLE) == [3]
    find(page, "#nothing")[0].click()
    assert page.execute_script(VISIBLE) == []
    assert "No method" in find(page, "#batch-0 .empty")[0].text
    find(page, "#all")[0].click()
    assert page.execute_script(VISIBLE) == list(range(8))
    assert page.get_log("browser") == []


def test_a_method_has_one_colour_everywhere_and_methods_differ(page):
    pairs = page.execute_script(
        "return [...document.querySelectorAll('.plot')].flatMap(p => (p.data || []).filter(t => t.meta.part === 'line')"
        ".map(t => [t.meta.method, t.line.color + ' ' + [].concat(t.marker.symbol)[0].replace('-open', '')]))"
    )
    looks = {}
    for method, look in pairs:
        looks.setdefault(method, set()).add(look)
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == 8


def test_dark_and_light(page):
    light = background(page)
    line = "return document.getElementById('batch-0').data[1].line.color"
    color = page.execute_script(line)
    find(page, "#theme")[0].click()
    assert background(page) != light
    assert page.execute_script(line) != color
    find(page, "#theme")[0].click()
    assert background(page) == light
    prefer = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", prefer)
    try:
        wait(page, lambda d: background(d) != light)
        assert page.execute_script(line) != color
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_hover_shows_a_label(page):
    spot = page.execute_script(
        "const p = document.querySelector('#batch-0 .scatterlayer .trace:nth-child(2) .point');"
        "const b = p.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
    )
    where = {"type": "mouseMoved", "x": spot[0], "y": spot[1]}
    page.execute_cdp_cmd("Input.dispatchMouseEvent", where)
    label = wait(page, lambda d: find(d, "#batch-0 .hoverlayer .hovertext"))
    assert "normprop" in label[0].text
    assert "test error" in label[0].text


def test_batch_size_is_chosen_for_curves_and_layers_together(page):
    batches = (
        "return [...new Set(['curves-0', 'layers-1'].flatMap("
        "i => document.getElementById(i).data.filter(t => t.visible).map(t => t.meta.batch)))]"
    )
    assert page.execute_script(batches) == [32]
    page.execute_script("document.querySelector('input[name=batch-layers][value=\"1\"]').click()")
    assert page.execute_script(batches) == [4]
    assert page.execute_script("return document.querySelector('input[name=batch-curves]:checked').value") == "1"


@pytest.mark.parametrize("width", [390, 768, 1600])
def test_fits_every_width(page, width):
    size(page, width, 16000)
    fits = "return [...document.querySelectorAll('.plot')].every(p => p.firstElementChild.scrollWidth <= p.clientWidth)"
    wait(page, lambda d: d.execute_script(fits))
    assert page.execute_script("return document.documentElement.scrollWidth") == width


def test_nothing_moves_while_the_page_loads(page):
    size(page, 1280, 900)
    page.refresh()
    moved = page.execute_async_script(
        "const done = arguments[0]; let sum = 0;"
        "new PerformanceObserver(list => list.getEntries().forEach(entry => sum += entry.value))"
        ".observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 500)"
    )
    assert moved < 0.01  # a page counts as steady below 0.1


def test_evil_names_stay_text(driver, make_document, tmp_path):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    document = make_document(["none", evil], batch_sizes=[8, 32])
    page = opened(driver, write(document, tmp_path / "evil.html"))
    assert page.title == document["title"]
    assert find(page, ".chip span")[1].text.startswith("</script>")
    assert find(page, "img") == []
    assert page.get_log("browser") == []


def test_sparse_reports_open_without_errors(driver, make_document, tmp_path):
    document = make_document(["normprop"], batch_sizes=[8], lrs=[0.02], seeds=[0])
    waiting = make_document(["none", "batch"], batch_sizes=[8, 32])
    for trial in waiting["trials"]:
        trial |= {"status": "waiting", "validation_error": None, "curve": [], "layers": []}
    for row in waiting["table"]:
        row |= {"error_mean": None, "best_lr": None}
    waiting["step_time"] = []
    many = make_document([f"method-{index}" for index in range(40)], batch_sizes=[8, 32], seeds=[0])
    empty = {name: [] for name in ("methods", "batch_sizes", "lrs", "seeds", "trials", "table")} | {"title": "None yet"}
    for name, each in (("one", document), ("waiting", waiting), ("many", many), ("empty", empty)):
        page = opened(driver, write(each, tmp_path / f"{name}.html"))
        assert page.get_log("browser") == []
        assert page.execute_script("return document.documentElement.scrollWidth") == 1280
