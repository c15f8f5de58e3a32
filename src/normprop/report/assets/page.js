"use strict";
(() => {
  const root = document.documentElement;
  const { figures, batches, colors, hidden: hiddenAtFirst } = JSON.parse(document.getElementById("payload").textContent);
  const hidden = new Set(hiddenAtFirst);
  let batch = batches[batches.length - 1];
  let theme = {};

  // Colours live in the style sheet alone, for both themes; the plots read them through an element that uses them.
  function readTheme() {
    const probe = document.createElement("i");
    document.body.append(probe);
    const resolve = (name) => {
      probe.style.color = `var(--${name})`;
      return toHex(getComputedStyle(probe).color);
    };
    const names = ["page", "text", "muted", "line", "grid", "raised", "bad", "bad-band", "first", "last"];
    theme = Object.fromEntries(names.map((name) => [name, resolve(name)]));
    theme.methods = colors.map((number) => resolve(`m${number}`));
    probe.remove();
  }

  const toHex = (rgb) => "#" + rgb.match(/\d+/g).slice(0, 3).map((part) => (+part).toString(16).padStart(2, "0")).join("");
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const alpha = (hex, opacity) => `rgba(${channels(hex)},${opacity})`;
  const mix = (from, to, share) => {
    const end = channels(to);
    return `rgb(${channels(from).map((start, i) => Math.round(start + share * (end[i] - start)))})`;
  };

  const shown = ({ meta }) => (meta.group === "ranking" || !hidden.has(meta.method)) && (meta.batch === undefined || meta.batch === null || meta.batch === batch);

  function paint(trace) {
    const { method, part, depth } = trace.meta;
    const color = part === "layer" ? mix(theme.first, theme.last, depth) : theme.methods[method];
    const painted = { ...trace, visible: shown(trace) };
    if (part === "band") return { ...painted, fillcolor: alpha(color, 0.13) };
    painted.line = { ...trace.line, color };
    painted.marker = { ...trace.marker, color, line: { width: 1, ...trace.marker.line, color: part === "diverged" ? color : theme.page } };
    for (const bar of ["error_x", "error_y"]) if (trace[bar]) painted[bar] = { ...trace[bar], color: alpha(color, 0.75) };
    painted.hoverlabel = { bordercolor: color };
    return painted;
  }

  // The layer plots share their vertical axes over what is shown, so that methods can be compared by eye.
  function sharedRange(axis, logarithmic) {
    let low = logarithmic ? 0 : -0.1;
    let high = logarithmic ? 0 : 0.1;
    for (const figure of figures) {
      if (figure.group !== "layers") continue;
      for (const trace of figure.traces) {
        if ((trace.yaxis || "y") !== axis || !shown(trace)) continue;
        for (const value of trace.y) {
          if (value === null || (logarithmic && value <= 0)) continue;
          const place = logarithmic ? Math.log10(value) : value;
          low = Math.min(low, place);
          high = Math.max(high, place);
        }
      }
    }
    const pad = Math.max(0.06 * (high - low), 0.02);
    return [low - pad, high + pad];
  }

  // Ticks at powers of two (of four, of eight ... on long axes), always with 1 among them.
  function powersOfTwo(range) {
    const [low, high] = range.map((end) => end / Math.log10(2));
    const step = Math.max(1, Math.ceil((high - low) / 4));
    const exponents = [];
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) exponents.push(at);
    return { tickvals: exponents.map((at) => 2 ** at), ticktext: exponents.map((at) => String(+(2 ** at).toPrecision(3))) };
  }

  function layoutOf(figure, width) {
    const layout = structuredClone(figure.layout);
    const family = getComputedStyle(document.body).fontFamily;
    Object.assign(layout, {
      width,
      height: figure.height,
      margin: { l: 44, r: 10, t: layout.annotations ? 22 : 10, b: 46, pad: 2 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 13, color: theme.muted },
      hoverlabel: { bgcolor: theme.raised, font: { family, color: theme.text, size: 13 }, align: "left" },
      hovermode: "closest",
      showlegend: false,
      dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      uirevision: batch,
    });
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      const axis = layout[name];
      const vertical = name[0] === "y";
      layout[name] = {
        gridcolor: theme.grid,
        showgrid: vertical,
        zeroline: false,
        showline: !vertical,
        linecolor: theme.line,
        ticks: vertical ? "" : "outside",
        tickcolor: theme.line,
        ticklen: 4,
        automargin: vertical ? "width" : false,
        ...axis,
        title: { standoff: vertical ? 4 : 10, font: { size: 13 }, ...axis.title },
      };
    }
    if (figure.group === "layers") {
      layout.yaxis.range = sharedRange("y", false);
      layout.yaxis2.range = sharedRange("y2", true);
      Object.assign(layout.yaxis2, powersOfTwo(layout.yaxis2.range));
    }
    if (figure.group === "time" || figure.group === "ranking") {
      const rows = new Set(figure.traces.filter(shown).map(({ meta }) => meta.method)).size;
      Object.assign(layout.yaxis, { autorange: false, range: [rows - 0.5, -0.5] });
    }
    for (const shape of layout.shapes || []) {
      shape.layer = "below";
      if (shape.name === "band") Object.assign(shape, { fillcolor: theme["bad-band"], line: { width: 0 } });
      else shape.line = { color: theme.muted, width: 1, dash: "dot" };
    }
    for (const note of layout.annotations || []) note.font = { color: theme.bad, size: 12 };
    return layout;
  }

  const config = {
    displaylogo: false,
    displayModeBar: false,
    doubleClick: "reset",
  };

  function draw(figure) {
    figure.stale = false;
    const { node } = figure;
    const panel = node.closest(".panel");
    panel.hidden = figure.method !== null && hidden.has(figure.method);
    if (panel.hidden) return;
    const empty = !figure.traces.some(shown);
    if (empty) {
      Plotly.purge(node);
      const words = document.createElement("p");
      words.className = "empty";
      words.textContent = figure.traces.length && figure.method === null ? "No method with results is switched on." : figure.empty;
      node.replaceChildren(words);
      return;
    }
    node.querySelector(".empty")?.remove();
    Plotly.react(node, figure.traces.map(paint), layoutOf(figure, node.clientWidth), config);
  }

  // Only plots near the window are drawn at once: the page opens fast with any number of methods.
  const near = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const figure = figures.find(({ id }) => id === target.id);
        figure.near = isIntersecting;
        if (isIntersecting && figure.stale) draw(figure);
      }
    },
    { rootMargin: "500px" },
  );

  function refresh(everything = false) {
    for (const figure of figures) {
      figure.stale = true;
      if (figure.method !== null) figure.node.closest(".panel").hidden = hidden.has(figure.method);
      if (everything || figure.near) draw(figure);
    }
  }

  function setTheme(name) {
    root.dataset.theme = name;
    const button = document.getElementById("theme");
    button.textContent = name === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
    readTheme();
    refresh();
  }

  function showMethods() {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(!hidden.has(+chip.dataset.method)));
    refresh();
  }

  const chips = [...document.querySelectorAll(".chip")];
  const only = (methods) => {
    hidden.clear();
    for (const chip of chips) if (!methods.includes(+chip.dataset.method)) hidden.add(+chip.dataset.method);
    showMethods();
  };
  for (const chip of chips) {
    const method = +chip.dataset.method;
    chip.addEventListener("click", () => {
      if (!hidden.delete(method)) hidden.add(method);
      showMethods();
    });
    chip.addEventListener("dblclick", () => only([method]));
  }
  document.getElementById("all")?.addEventListener("click", () => only(chips.map((chip) => +chip.dataset.method)));
  document.getElementById("nothing")?.addEventListener("click", () => only([]));

  for (const input of document.querySelectorAll(".chooser input")) {
    input.addEventListener("change", () => {
      batch = batches[+input.value];
      for (const other of document.querySelectorAll(`.chooser input[value="${input.value}"]`)) other.checked = true;
      refresh();
    });
  }

  const copy = document.getElementById("copy");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      const code = document.getElementById("command");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Selected";
      }
      setTimeout(() => (copy.textContent = "Copy"), 1600);
    });
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  toggle.hidden = false;
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));

  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.classList.add("printing");
    setTheme("light");
    refresh(true);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    setTheme(before);
  });

  let width = innerWidth;
  let waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 120);
  });

  for (const figure of figures) {
    figure.node = document.getElementById(figure.id);
    figure.stale = true;
    near.observe(figure.node);
  }
  setTheme(dark.matches ? "dark" : "light");
})();
