// A click on a heading sorts the table by its column, a second one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const numeric = row => row.cells[column].dataset.value !== undefined;
    const compare = (a, b) => numeric(a) ? value(a) - value(b) : value(a).localeCompare(value(b), "en", {numeric: true});
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => direction * compare(a, b)));
  }));
}
