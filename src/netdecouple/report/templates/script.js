"use strict";
(function () {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const current = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const show = () => {
    const other = current() === "dark" ? "Light" : "Dark";
    button.textContent = other;
    button.setAttribute("aria-label", "Switch to the " + other.toLowerCase() + " scheme");
  };
  try { root.dataset.theme = localStorage.getItem("netdecouple-theme") || ""; } catch (error) { /* not kept */ }
  if (!root.dataset.theme) delete root.dataset.theme;
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = current() === "dark" ? "light" : "dark";
    try { localStorage.setItem("netdecouple-theme", root.dataset.theme); } catch (error) { /* not kept */ }
    show();
  });
  dark.addEventListener("change", show);
  show();

  const key = (row, column) => {
    const cell = row.cells[column];
    const given = cell.dataset.value;
    if (given === undefined) return cell.textContent.trim() || null;
    return given === "" ? null : Number(given);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  for (const button of document.querySelectorAll("table.sortable thead button")) {
    const header = button.closest("th");
    button.addEventListener("click", () => {
      const body = header.closest("table").tBodies[0];
      const falling = header.getAttribute("aria-sort") === "ascending";
      for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = Array.from(body.rows, (row, at) => ({ row, at, key: key(row, header.cellIndex) }));
      rows.sort((a, b) => {
        if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.at - b.at;
        return (falling ? -1 : 1) * compare(a.key, b.key) || a.at - b.at;
      });
      body.append(...rows.map((entry) => entry.row));
    });
  }

  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
