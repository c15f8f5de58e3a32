"use strict";
(() => {
  const root = document.documentElement;
  const { traces, stages } = JSON.parse(document.getElementById("payload").textContent);
  const node = document.getElementById("signal");
  let theme = {};

  // Colours live in the style sheet alone, for both themes; the plots read them through an element that uses them.
  function readTheme() {
    const probe = document.createElement("i");
    document.body.append(probe);
    const names = ["page", "text", "muted", "line", "grid", "raised", "bad", "m0", "m1", "m2"];
    theme = Object.fromEntries(
      names.map((name) => {
        probe.style.color = `var(--${name})`;
        return [name, getComputedStyle(probe).color];
      }),
    );
    probe.remove();
  }

  function paint(trace) {
    const { part, flagged } = trace.meta;
    const color = { predicted: theme.m0, measured: theme.m1, gradient: theme.m2 }[part];
    const many = trace.x.length > 120;
    const size = many ? 5 : 7;
    const ringed = flagged.map((flag) => flag && trace.meta.quantity === "std" && part === "measured");
    return {
      ...trace,
      line: { color, width: 1.6 },
      marker: {
        opacity: 1,
        symbol: ringed.map((ring) => (ring ? "circle-open-dot" : "circle")),
        color: ringed.map((ring) => (ring ? theme.bad : color)),
        size: ringed.map((ring) => (ring ? size + 5 : size)),
        line: { color: ringed.map((ring) => (ring ? theme.bad : theme.page)), width: ringed.map((ring) => (ring ? 2 : 0.6)) },
      },
      hoverlabel: { bordercolor: color },
    };
  }

  // Ticks at powers of two (of four, of eight ... on long axes).
  function powers(axis) {
    const values = traces.filter((trace) => trace.yaxis === axis).flatMap(({ y }) => y.filter((value) => value !== null && value > 0));
    if (!values.length) return {};
    const logs = values.map(Math.log2);
    const low = Math.min(...logs) - 0.35;
    const high = Math.max(...logs) + 0.35;
    const step = Math.max(1, Math.ceil((high - low) / 7));
    const exponents = [];
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) exponents.push(at);
    const named = (at) => (at >= -10 && at <= 13 ? String(+(2 ** at).toPrecision(at < -3 ? 2 : 4)) : (2 ** at).toExponential(1));
    return {
      range: [low * Math.log10(2), high * Math.log10(2)],
      tickvals: exponents.map((at) => 2 ** at),
      ticktext: exponents.map(named),
    };
  }

  function layout() {
    const family = getComputedStyle(document.body).fontFamily;
    const count = traces[0].x.length;
    const width = node.clientWidth;
    const titles = [];
    const vertical = (title, domain, more) => {
      titles.push({
        text: title, textangle: -90, x: 0, xref: "paper", xshift: -60, y: (domain[0] + domain[1]) / 2, yref: "paper",
        xanchor: "center", yanchor: "middle", showarrow: false, font: { size: 13, color: theme.muted },
      });
      return { domain, gridcolor: theme.grid, zeroline: false, ...more };
    };
    const shapes = stages.map(({ first, last }, index) => ({
      type: "rect", xref: "x", yref: "paper", layer: "below",
      x0: first - 0.5, x1: last + 0.5, y0: 0, y1: 1,
      fillcolor: index % 2 ? theme.raised : theme.page, line: { width: 0 },
    }));
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, layer: "below", line: { color: theme.muted, width: 1, dash: "dot" } });
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y2", y0: 0, y1: 0, layer: "below", line: { color: theme.muted, width: 1, dash: "dot" } });
    const axes = {
      yaxis: vertical("standard deviation", [0.58, 1], { type: "log", ...powers("y") }),
      yaxis2: vertical("mean", [0.31, 0.54], { nticks: 5 }),
      yaxis3: vertical("gradient, rms", [0, 0.27], { type: "log", ...powers("y3") }),
    };
    const names = stages
      .filter(({ first, last, name }) => ((last - first + 1) / count) * (width - 80) > 6.6 * name.replace(/&\w+;/g, "x").length + 6)
      .map(({ first, last, name }) => ({
        text: name, x: (first + last) / 2, xref: "x", y: 1, yref: "paper", yanchor: "bottom", showarrow: false,
        font: { size: 12, color: theme.muted },
      }));
    return {
      width,
      height: 760,
      margin: { l: 72, r: 8, t: 24, b: 44, pad: 2 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 13, color: theme.muted },
      hoverlabel: { bgcolor: theme.raised, font: { family, color: theme.text, size: 13 }, align: "left" },
      hovermode: "closest",
      showlegend: false,
      dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      shapes,
      annotations: [...names, ...titles],
      xaxis: {
        range: [0.3, count + 0.7], anchor: "y3", showgrid: false, zeroline: false, showline: true, linecolor: theme.line,
        ticks: "outside", tickcolor: theme.line, ticklen: 4, title: { text: "call", standoff: 8, font: { size: 13 } },
        tickformat: "d", nticks: 14, showspikes: true, spikemode: "across", spikesnap: "data", spikethickness: 1, spikedash: "solid", spikecolor: theme.line,
      },
      ...axes,
    };
  }

  function draw() {
    if (node) Plotly.react(node, traces.map(paint), layout(), { displaylogo: false, displayModeBar: false, doubleClick: "reset" });
  }

  function setTheme(name) {
    root.dataset.theme = name;
    const button = document.getElementById("theme");
    button.textContent = name === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
    readTheme();
    draw();
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  toggle.hidden = false;
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  setTheme(dark.matches ? "dark" : "light");
  if (!node) return;

  node.on("plotly_click", ({ points }) => {
    const row = document.getElementById(`call-${points[0].x}`);
    row.scrollIntoView({ block: "center" });
    for (const other of document.querySelectorAll(".found")) other.classList.remove("found");
    row.classList.add("found");
  });

  const search = document.getElementById("search");
  const only = document.getElementById("only");
  const count = document.getElementById("count");
  const bodies = [...document.querySelectorAll(".calls tbody")];
  function filter() {
    const words = search.value.toLowerCase().trim();
    let shown = 0;
    for (const body of bodies) {
      let any = false;
      for (const row of body.querySelectorAll("tr[data-words]")) {
        row.hidden = !row.dataset.words.includes(words) || (only.checked && !row.classList.contains("flagged"));
        any ||= !row.hidden;
        shown += !row.hidden;
      }
      body.hidden = !any;
    }
    count.textContent = words || only.checked ? `${shown} of ${traces[0].x.length} calls` : "";
  }
  document.querySelector(".filter").hidden = false;
  search.addEventListener("input", filter);
  only.addEventListener("change", filter);

  let width = innerWidth;
  let waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 120);
  });
})();
