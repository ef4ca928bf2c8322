"""The page's style sheet.

It has one column on a phone and charts side by side on a wide window. It is light or dark, as the
reader's system is.
"""

from ffssl.plots import COLOURS, ink

LIGHT = {
    "page": "#f6f7f9",
    "card": "#ffffff",
    "ink": "#1f2328",
    "muted": "#59636e",
    "rule": "#d9dee3",
    "mark": "#fff3d6",
    "frame": "#d55e00",
}
DARK = {
    "page": "#0e1116",
    "card": "#171b21",
    "ink": "#e6e9ed",
    "muted": "#9aa4af",
    "rule": "#2e353d",
    "mark": "#3d3116",
    "frame": "#ff8a3d",
}
COLOURS_ON_DARK = (
    "#4c9be8",
    "#f0894a",
    "#2fc99a",
    "#e39cc4",
    "#8fd3fb",
    "#f0b93a",
    "#e6e9ed",
    "#bd9560",
)


def _declare(colours: dict[str, str], runs: tuple[str, ...], texts: tuple[str, ...]) -> str:
    names = (
        colours
        | {f"run{i}": tone for i, tone in enumerate(runs)}
        | {f"ink{i}": tone for i, tone in enumerate(texts)}
    )
    return " ".join(f"--{name}: {tone};" for name, tone in names.items())


CSS = (
    f"""
:root {{ color-scheme: light dark; {_declare(LIGHT, COLOURS, tuple(map(ink, COLOURS)))} }}
@media (prefers-color-scheme: dark) {{
  :root {{ {_declare(DARK, COLOURS_ON_DARK, COLOURS_ON_DARK)} }}
}}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 44px 0 4px; scroll-margin-top: 12px; }
h3 { font-size: 15px; margin: 22px 0 8px; display: flex; align-items: center; gap: 8px;
  overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 76ch; }
.muted, .note { color: var(--muted); }
.note, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.note { padding: 10px 14px; margin: 10px 0; max-width: none; overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--frame); color: var(--ink); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 22px; font-size: 14px; }
a { color: var(--ink0); text-decoration: none; } a:hover { text-decoration: underline; }
.swatch { flex: none; display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  background: var(--tone); }
.chip { display: inline-block; font-size: 12px; font-weight: 500; line-height: 1.5; padding: 0 8px;
  border-radius: 99px; white-space: nowrap; }
.chip { background: var(--mark); border: 1px solid var(--frame); }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); margin-top: 12px; }
.charts.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.charts.middle { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr));
  margin-top: 0; }
.charts .card { padding: 12px 12px 8px; min-width: 0; }
.caption { font-size: 13.5px; color: var(--muted); margin: 8px 2px; }
.charts svg { display: block; width: 100%; height: auto; }
.charts .words { padding: 14px 18px; font-size: 14px; color: var(--muted); align-self: start; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif !important;
  paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
.scroll { overflow-x: auto; } .scroll + p { margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
thead th { font-weight: 500; color: var(--muted); font-size: 13px; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; overflow-wrap: anywhere; }
td small { display: block; color: var(--muted); font-size: 12.5px; }
.number { text-align: right; white-space: nowrap; }
.run { display: inline-flex; align-items: center; gap: 8px; }
.config td, .config tbody th { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  padding: 5px 12px; overflow-wrap: anywhere; }
.config tbody th { min-width: 150px; } .config td { min-width: 84px; }
.config tr.differs { background: var(--mark); }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--muted); padding: 4px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0;
  padding: 12px 16px; font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; } dd code { font-size: 12.5px;
  }
img { display: block; border-radius: 2px; }
.epochs { padding: 4px 16px; }
.epoch { display: grid; grid-template-columns: 118px 1fr; gap: 12px; padding: 14px 0;
  border-bottom: 1px solid var(--rule); }
.epoch:last-child { border-bottom: 0; }
.epoch small { display: block; color: var(--muted); line-height: 1.4; }
.images { --full: min(var(--side), 18vw); display: flex; flex-wrap: wrap; gap: 14px;
  align-items: flex-start; }
.views { display: grid; gap: 6px; width: calc((var(--full) + 6px) * var(--across)); }
.views { grid-template-columns: repeat(var(--across), calc(var(--full) * var(--share))); }
.views img { width: 100%; }
img.chosen { outline: 3px solid var(--frame); outline-offset: 0; box-shadow: 0 0 0 4px var(--card);
  }
.pixels img { image-rendering: pixelated; }
.neighbours { padding: 10px 16px; }
.row { display: flex; gap: 10px; padding: 8px 0; }
.row figure { margin: 0; flex: 0 1 112px; min-width: 0; }
.row figure:first-child { margin-right: 12px; }
.row img { width: 100%; }
.row figcaption { font-size: 12px; line-height: 1.35; color: var(--muted); margin-top: 3px;
  overflow: hidden; text-overflow: ellipsis; }
.row figure:first-child figcaption { color: var(--ink); font-weight: 600; }
.other img { outline: 2px dashed var(--frame); outline-offset: 1px; }
.other figcaption { color: var(--frame); }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 720px) {
  main { padding: 20px 14px 48px; }
  h1 { font-size: 23px; }
  .summary thead { display: none; }
  .summary tr { display: grid; grid-template-columns: 1fr 1fr; gap: 6px 14px; padding: 12px 14px;
    border-bottom: 1px solid var(--rule); }
  .summary tr:last-child { border-bottom: 0; }
  .summary td, .summary th { border: 0; padding: 0; text-align: left; }
  .summary th { grid-column: 1 / -1; }
  .summary td::before { content: attr(data-label); display: block; color: var(--muted);
    font-size: 12px; }
  .epoch { grid-template-columns: 1fr; gap: 8px; }
  .epoch small { display: inline; margin-left: 8px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
  .row { gap: 5px; } .row figure:first-child { margin-right: 5px; }
  .row figcaption { font-size: 10.5px; } .row figure:nth-child(n+6) { display: none; }
}
@media print { body { background: none; } .card { break-inside: avoid; } nav { display: none; } }
"""
)
