"""What does the demo's page look like, in light and in dark mode?"""

from __future__ import annotations

#: Heat-map colours are mixed from the neutral ``--mid`` to a pole by each cell's own ``--t``.
STYLE = """
:root {
  --ground: #ffffff; --panel: #f6f7f9; --ink: #1c2128; --faint: #5b6470; --line: #d9dee4;
  --mid: #f3f4f6; --pos: #2166ac; --neg: #b2182b; --score: #7a2f8f; --strong: #ffffff;
  --good: #1a7f4b; --some: #96640a; --bad: #b2182b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171c; --panel: #1d2128; --ink: #e4e8ee; --faint: #9aa4b1; --line: #343b46;
    --mid: #262b33; --pos: #3c86d8; --neg: #d64550; --score: #a458bd; --strong: #ffffff;
    --good: #56c58d; --some: #e0ad4e; --bad: #ef7680;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 23px; margin: 52px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
h1 code { background: var(--panel); padding: 0 8px; border-radius: 6px; overflow-wrap: anywhere; }
.facts, footer { color: var(--faint); font-size: 14px; margin: 0; }
footer { margin-top: 36px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 14px; margin: 24px 0 0; }
.card {
  display: block; padding: 12px 16px 14px; border-radius: 8px; background: var(--panel);
  border-left: 4px solid; color: inherit; text-decoration: none;
}
.card b { margin-right: 8px; }
.card i { font-style: normal; font-size: 13px; font-weight: 600; }
.card span { display: block; font-size: 14px; margin-top: 4px; }
.card.clear { border-color: var(--good); } .card.clear i { color: var(--good); }
.card.partial { border-color: var(--some); } .card.partial i { color: var(--some); }
.card.none { border-color: var(--bad); } .card.none i { color: var(--bad); }
.left-out { padding: 12px 16px; background: var(--panel); border-left: 4px solid var(--some); border-radius: 8px; }
.headline { font-size: 18px; font-weight: 600; margin: 4px 0 8px; padding-left: 12px; border-left: 4px solid; }
.headline.clear {
  border-color: var(--good); } .headline.partial { border-color: var(--some);
  } .headline.none { border-color: var(--bad);
}
.findings { margin: 0 0 14px; padding-left: 20px; }
.findings li { margin: 3px 0; }
.grid { display: flex; flex-wrap: wrap; gap: 8px 36px; align-items: flex-start; }
.grid > figure { width: min-content; min-width: 270px; max-width: 100%; }
.grid > figure.small { width: 440px; }
.grid .plain td { white-space: nowrap; }
figure { margin: 22px 0 0; min-width: 0; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 8px; }
.scroll { overflow-x: auto; padding-bottom: 2px; }
table { border-collapse: separate; border-spacing: 2px; font-size: 13px; font-variant-numeric: tabular-nums; }
.heat th { font-weight: 400; color: var(--faint); white-space: nowrap; }
.heat th[scope=row] { text-align: right; padding-right: 6px; }
.heat td[data-tip] {
  position: relative; min-width: 46px; height: 30px; padding: 0 5px; text-align: center; border-radius: 3px;
  background: var(--mid); cursor: default;
}
.heat td.pos { background: color-mix(in oklab, var(--pos) var(--t), var(--mid)); }
.heat td.neg { background: color-mix(in oklab, var(--neg) var(--t), var(--mid)); }
.heat td.score { background: color-mix(in oklab, var(--score) var(--t), var(--mid)); }
.heat td.strong { color: var(--strong); }
.heat.dense { border-spacing: 1px; }
.heat.dense td[data-tip] { min-width: 16px; width: 20px; height: 20px; padding: 0; font-size: 0; }
.heat.dense th { font-size: 10px; }
.heat.dense th[scope=col] span { writing-mode: vertical-rl; transform: rotate(180deg); }
.heat.upright th[scope=col] { height: 96px; vertical-align: bottom; }
.heat.upright th[scope=col] span { writing-mode: vertical-rl; transform: rotate(180deg); display: inline-block; }
.heat td[data-tip]:hover { outline: 2px solid var(--ink); z-index: 2; }
.heat td[data-tip]:hover::after {
  content: attr(data-tip); position: absolute; bottom: calc(100% + 4px); left: 50%;
  transform: translateX(-50%); padding: 2px 8px; border-radius: 4px; background: var(--ink);
  color: var(--ground); font-size: 12px; white-space: nowrap; pointer-events: none; z-index: 3;
}
.heat td[data-tip]:nth-last-child(-n+2):hover::after { left: auto; right: 0; transform: none; }
.legend { width: 190px; margin-top: 8px; font-size: 12px; color: var(--faint); }
.legend div { display: flex; justify-content: space-between; }
.ramp { display: block; height: 9px; border-radius: 3px; }
.ramp.signed { background: linear-gradient(to right in oklab, var(--neg), var(--mid), var(--pos)); }
.ramp.score { background: linear-gradient(to right in oklab, var(--mid), var(--score)); }
.plain { border-spacing: 0; }
.plain th, .plain td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); }
.plain th { color: var(--faint); font-weight: 500; white-space: nowrap; }
.prompts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 10px 0; font-size: 14px; }
.prompts dt { color: var(--faint); } .prompts dd { margin: 0; }
svg { display: block; width: 100%; height: auto; }
figure.wide svg { min-width: 780px; }
svg text { font-size: 12px; fill: var(--faint); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .zero { stroke: var(--faint); }
svg .curve { fill: none; stroke: var(--score); stroke-width: 2; stroke-linejoin: round; }
svg .dot { fill: var(--score); }
svg .ground { fill: var(--panel); }
svg .bar.pos { fill: var(--pos); } svg .bar.neg { fill: var(--neg); }
svg .att { fill: var(--score); } svg .frame { fill: var(--panel); stroke: var(--line); }
pre {
  background: var(--panel); padding: 14px 16px; border-radius: 8px; overflow-x: auto; font-size: 13px;
  line-height: 1.5;
}
"""
