"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const groups = [...table.tHead.rows[0].cells].flatMap((cell) => Array(cell.colSpan).fill(cell.textContent.trim()));
  const status = document.getElementById(table.dataset.status);

  const valueIn = (row, column) => {
    const cell = row.cells[column];
    const given = cell.dataset.value;
    return given === undefined ? cell.textContent.trim() : given === "inf" ? Infinity : Number(given);
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a === b ? 0 : a - b);

  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      // Names start at A; of numbers one looks for the largest first.
      const first = header.classList.contains("number") ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      const order = header.getAttribute("aria-sort") === first ? second : first;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => sign * compare(valueIn(a, column), valueIn(b, column)));
      body.append(...rows);
      for (const other of headers) other.setAttribute("aria-sort", other === header ? order : "none");
      const title = [groups[column], header.textContent.trim()].filter(Boolean).join(", ");
      status.textContent = `Sorted by ${title}, ${order}.`;
    });
  });
}
