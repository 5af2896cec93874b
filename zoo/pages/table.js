// Tables: a click on a column's name sorts; the search field and the buttons of fields hide rows.
"use strict";
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const cell = row => row.cells[column].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [cell(a), cell(b)];
      if (!x || !y) return Number(!x) - Number(!y); // empty cells come last
      const [m, n] = [parseFloat(x.replace(/,/g, "")), parseFloat(y.replace(/,/g, ""))];
      const order = isNaN(m) || isNaN(n) ? x.localeCompare(y) : m - n;
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
const search = document.querySelector("input[type=search]");
if (search) {
  const buttons = [...document.querySelectorAll("button[data-field]")];
  const tables = [...document.querySelectorAll("table[data-searched]")];
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const field = buttons.find(b => b.getAttribute("aria-pressed") === "true")?.dataset.field ?? "";
    for (const table of tables) {
      let count = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase() + " " + row.dataset.field;
        row.hidden = Boolean(field && row.dataset.field !== field) || !words.every(word => text.includes(word));
        count += !row.hidden;
      }
      const told = document.getElementById(table.dataset.searched);
      if (told) told.textContent = `${count} of ${table.tBodies[0].rows.length}`;
    }
  };
  search.addEventListener("input", show);
  for (const button of buttons) button.addEventListener("click", () => {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    show();
  });
  show(); // the browser keeps what was typed
}
