"""What does the page of a comparison have besides the demo's style, and how do its tables sort?"""

from __future__ import annotations

STYLE_OF_COMPARISON = """
.verdict { font-size: 18px; font-weight: 600; margin: 14px 0 0; padding-left: 12px; border-left: 4px solid; }
.verdict.clear { border-color: var(--good); } .verdict.none { border-color: var(--bad); color: var(--bad); }
details { margin: 16px 0 0; }
summary { cursor: pointer; font-size: 14px; font-weight: 600; color: var(--ink); }
details.facts { margin-top: 4px; }
details.facts ul { margin: 6px 0 0; padding-left: 20px; }
details.facts code { white-space: pre-wrap; overflow-wrap: anywhere; }
.heat td[data-tip] { height: 23px; }
.card i { white-space: nowrap; }
.card span { overflow-wrap: anywhere; color: var(--faint); }
.plain th[scope=row] { color: var(--ink); font-weight: 400; }
.sortable td:last-child { min-width: 200px; overflow-wrap: anywhere; }
.plain code { font-size: 12px; }
.plain .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.plain tr.fails td, .plain tr.fails th { color: var(--bad); }
.plain tr.known td, .plain tr.known th { color: var(--some); }
.plain tr.shown td, .plain tr.shown th { color: var(--faint); }
.costs small { color: var(--faint); }
.sortable button {
  all: unset; cursor: pointer; color: var(--faint); font-weight: 500; white-space: nowrap;
}
.sortable button:hover { color: var(--ink); }
.sortable button:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
.sortable th[aria-sort=ascending] button::after { content: " \\2191"; }
.sortable th[aria-sort=descending] button::after { content: " \\2193"; }
.reasons { margin: 14px 0 0; padding-left: 20px; font-size: 14px; }
.reasons b { font-weight: 600; } .reasons .fails b { color: var(--bad); } .reasons .known b { color: var(--some); }
"""

#: Numbers are sorted largest first at the first click, words in alphabetical order.
SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const body = table.tBodies[0], rows = [...body.rows];
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const numeric = rows.every(row => row.cells[column].dataset.key !== undefined);
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : !numeric;
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.sort((a, b) => numeric ? key(a) - key(b) : key(a).localeCompare(key(b), "en", {numeric: true}));
    body.append(...(up ? rows : rows.reverse()));
  }));
}
"""
