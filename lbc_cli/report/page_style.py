"""The style of a run's page: one column on a phone, two for charts and small tables on a desk, light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #59646e; --line: #dfe4e8; --paper: #fff; --shade: #f4f6f8;
  --good: #0b6e4f; --bad: #a8321c; --busy: #1f5fa8; --band: #e6ebf1;
  --blue: #0072b2; --vermillion: #d55e00; --green: #009e73; --purple: #b8588f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #9aa5ae; --line: #343b42; --paper: #15191d;
  --shade: #1d2227; --good: #4cc79b; --bad: #f0836b; --busy: #7db4f0; --band: #262e37;
  --blue: #56b4e9; --vermillion: #ff8a3d; --green: #2fc99b; --purple: #e08fc0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.02rem; margin: 2.2rem 0 .6rem; }
header p { margin: .5rem 0 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .88rem; }
.message { color: var(--bad); }
.badge { display: inline-block; padding: .05rem .6rem; margin-right: .3rem; border: 1px solid currentColor;
  border-radius: 1rem; font-size: .82rem; color: var(--soft); }
.badge.done { color: var(--good); } .badge.running { color: var(--busy); }
.badge.failed, .badge.interrupted, .badge.diverged { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .7rem;
  margin-top: 1.3rem; }
.figures div { background: var(--shade); border-radius: .5rem; padding: .7rem .8rem; }
.figures b { display: block; font-size: 1.2rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .82rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2.5rem; }
.pair > * { min-width: 0; }
.warnings { border-left: 3px solid var(--bad); padding-left: 1rem; margin-top: 1.6rem; }
.warnings h2 { margin-top: 0; } .warnings ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; justify-content: flex-end; }
figcaption { font-size: .88rem; margin-bottom: .2rem; } figcaption > span { color: var(--soft); font-size: .82rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.key { display: inline-block; width: 1.4rem; border-top: 2px solid currentColor; vertical-align: middle;
  margin-right: .4rem; }
.key.dashed { border-top-style: dashed; } .key.shaded { border-top: .7rem solid var(--band); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid, .axis { stroke: var(--line); fill: none; } .axis { stroke: var(--soft); } .shade { fill: var(--band); }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.dashed .line { stroke-dasharray: 5 3; } .dot { fill: currentColor; } .hit { fill: transparent; }
.blue { color: var(--blue); } .vermillion { color: var(--vermillion); } .green { color: var(--green); }
.purple { color: var(--purple); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
th.number, td.number { text-align: right; }
dl { display: grid; grid-template-columns: minmax(5.5rem, max-content) 1fr; gap: .25rem 1.2rem; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
summary { cursor: pointer; color: var(--soft); margin: .8rem 0 .4rem; font-size: .9rem; }
pre { overflow-x: auto; background: var(--shade); padding: .9rem; border-radius: .5rem; font-size: .8rem; margin: 0; }
.command { white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3rem; }
@media (max-width: 30rem) { main { padding: 1rem .8rem 3rem; } h1 { font-size: 1.25rem; }
  th, td { padding-right: .7rem; } table { font-size: .8rem; } svg text { font-size: 13px; }
  .loose td { white-space: normal; overflow-wrap: break-word; min-width: 0; } }
@media print { details { display: block; } .wide { overflow: visible; } }
"""
