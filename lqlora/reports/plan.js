// A click on the head of a column sorts its table: numbers by value, names as words with numbers in them.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
    const compare = (a, b) =>
      isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b), "en", { numeric: true }) : key(a) - key(b);
    body.append(...[...body.rows].sort((a, b) => (descending ? compare(b, a) : compare(a, b))));
  });
}
