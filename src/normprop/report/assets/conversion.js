(() => {
  "use strict";
  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  function setTheme(name) {
    root.dataset.theme = name;
    toggle.textContent = name === "dark" ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
  }
  toggle.hidden = false;
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  setTheme(dark.matches ? "dark" : "light");

  const panel = document.querySelector(".filter");
  if (!panel) return;
  const search = document.getElementById("search");
  const boxes = [...panel.querySelectorAll("input[type=checkbox]")];
  const rows = [...document.querySelectorAll(".sites tbody tr")];
  function filter() {
    const words = search.value.toLowerCase().trim();
    const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.dataset.words.includes(words) || hidden.has(row.dataset.action);
      shown += !row.hidden;
    }
    document.getElementById("count").textContent = shown < rows.length ? `${shown} of ${rows.length}` : "";
  }
  panel.hidden = false;
  search.addEventListener("input", filter);
  for (const box of boxes) box.addEventListener("change", filter);
})();
