// Sort a table by the column whose heading was pressed; numbers as such, cells without one last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const falling = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const sign = falling ? -1 : 1;
    const text = (row) => row.cells[heading.cellIndex].textContent.trim();
    const number = (row) => parseFloat(text(row).replace(/^[[<\s]+/, ""));
    const compare = (one, other) => {
      const [x, y] = [number(one), number(other)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || sign * text(one).localeCompare(text(other));
      return sign * (x - y);
    };
    const body = heading.closest("table").tBodies[0];
    body.append(...[...body.rows].sort(compare));
  });
}
// A link into a folded part opens it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const folded = target && target.closest("details");
  if (folded) { folded.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", unfold);
unfold();
