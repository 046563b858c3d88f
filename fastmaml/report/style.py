# The colours and the style sheet of the page. Colours are named by role, with a value for light and one for dark.
# Blue, vermilion and grey are distinct in every kind of colour blindness. Dashes, markers and signs repeat the colours.
from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "surface": "#f5f6f7",
    "ink": "#1a1e23",
    "muted": "#56606b",
    "rule": "#d8dce0",
    "grid": "#e8eaed",
    "learner": "#0a62ab",
    "random": "#c8500c",
    "plain": "#737b85",
    "early": "#3f9fd0",
}
DARK = {
    "paper": "#14171a",
    "surface": "#1d2125",
    "ink": "#e9ebee",
    "muted": "#a3acb6",
    "rule": "#363d44",
    "grid": "#282e34",
    "learner": "#62b6f4",
    "random": "#f2914d",
    "plain": "#98a1ab",
    "early": "#3f86b5",
}
# Placeholder colours. plots.py replaces each by var(--role), so one SVG serves light, dark and print.
THEMED = {role: f"#0f0e{0xD0 + i:02x}" for i, role in enumerate(LIGHT)}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{role}: {value};" for role, value in colours.items())


CSS = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} --invert: none; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} --invert: invert(1); }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-feature-settings: "kern", "liga", "calt"; -webkit-font-smoothing: antialiased;
  text-rendering: optimizeLegibility; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 32px 72px; }
h1 { font-size: clamp(1.9rem, 1.3rem + 2.4vw, 2.75rem); line-height: 1.12; letter-spacing: -0.022em; font-weight: 650;
  margin: 6px 0 0; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.25; letter-spacing: -0.012em; font-weight: 650; margin: 0 0 6px; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 2px; }
p { margin: 0 0 12px; max-width: 68ch; }
code, pre { font-family: ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.86em; }
section { margin-top: 60px; }
.eyebrow { color: var(--muted); font-size: 0.84rem; margin: 0; }
.lede { font-size: clamp(1.08rem, 1rem + 0.5vw, 1.3rem); line-height: 1.5; margin: 18px 0 0; max-width: 60ch;
  text-wrap: pretty; }
.lede b { font-weight: 650; color: var(--learner); white-space: nowrap; }
.quiet { color: var(--muted); }
.num { font-variant-numeric: tabular-nums; white-space: nowrap; }

.stats { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 20px 24px;
  margin: 34px 0 0; padding: 22px 0 0;
  border-top: 1px solid var(--rule); }
.stats dt { color: var(--muted); font-size: 0.84rem; line-height: 1.4; }
.stats dd { margin: 0 0 2px; font-size: 1.7rem; line-height: 1.15; letter-spacing: -0.02em; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.stats dd small { font-size: 0.95rem; font-weight: 500; letter-spacing: 0; color: var(--muted); }
.stats div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }

.notes { margin: 30px 0 0; padding: 14px 18px; border-left: 3px solid var(--random); background: var(--surface);
  border-radius: 0 6px 6px 0;
  font-size: 0.93rem; }
.notes p { margin: 0; max-width: 80ch; } .notes p + p { margin-top: 6px; }

figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
figcaption { color: var(--muted); font-size: 0.88rem; line-height: 1.5; margin-top: 8px; max-width: 68ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 34px 44px;
  margin-top: 22px; }
.figures.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 28px 32px; }
.beside { display: grid; grid-template-columns: minmax(0, 1.8fr) minmax(0, 1fr); gap: 8px 40px; align-items: center;
  margin-top: 22px; }
.beside .legend { flex-direction: column; gap: 10px; margin: 0; } .beside .legend li { align-items: flex-start;
  line-height: 1.35; }
.beside .legend svg { margin-top: 3px; } .beside figcaption { margin-top: 18px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 14px 0 0; padding: 0; list-style: none;
  font-size: 0.88rem; }
.legend li { display: flex; align-items: center; gap: 8px; }
.legend svg { flex: none; width: 28px; height: 12px; }

.scroll { overflow-x: auto; margin-top: 22px; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 10px; border-bottom: 1px solid var(--grid); white-space: nowrap;
  vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 500; color: var(--muted); font-size: 0.84rem; border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 400; white-space: normal; min-width: 11em; line-height: 1.35; }
tbody tr.group th { font-weight: 600; padding-top: 22px; border-bottom-color: var(--rule); }
tbody tr.learner th, tbody tr.learner td { font-weight: 600; }
td .pm { color: var(--muted); font-weight: 400; font-size: 0.9em; margin-left: 0.3em; }
td.spans { text-align: left; }
td.as-trained, thead th.as-trained { background: var(--surface); }
details { margin-top: 18px; } summary { cursor: pointer; color: var(--muted); font-size: 0.92rem; }
summary:hover { color: var(--ink); }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); gap: 26px 32px;
  margin-top: 20px; }
.facts { margin: 0; font-size: 0.92rem; }
.facts div { display: flex; justify-content: space-between; gap: 18px; padding: 5px 0;
  border-bottom: 1px solid var(--grid); }
.facts dt { color: var(--muted); } .facts dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
pre { background: var(--surface); border-radius: 6px; padding: 14px 16px; line-height: 1.6; margin: 16px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }

.share { height: 8px; border-radius: 4px; background: var(--learner); overflow: hidden; margin: 12px 0 8px; }
.share i { display: block; height: 100%; background: var(--random); border-right: 2px solid var(--paper); }

.task { margin-top: 30px; }
.task > header { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; padding-bottom: 8px;
  border-bottom: 1px solid var(--rule); }
.task > header p { margin: 0; font-size: 0.9rem; color: var(--muted); }
.classes { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 18px 12px;
  margin-top: 14px; }
.class { min-width: 0; max-width: 260px; }
.class h4 { margin: 0 0 4px; font-size: 0.8rem; font-weight: 600; color: var(--muted); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(40px, 1fr)); gap: 6px; }
.pictures.one { grid-template-columns: minmax(0, 76px); }
.pictures.query { grid-template-columns: repeat(auto-fill, minmax(min(100%, 48px), 1fr)); gap: 8px 6px;
  margin-top: 10px; padding-top: 10px;
  border-top: 1px dashed var(--rule); }
.picture { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px; image-rendering: pixelated;
  background: var(--surface);
  border: 1px solid var(--grid); }
.picture.ink { padding: 3px; } .picture.ink img { filter: var(--invert); }
.picture img { display: block; width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated;
  border-radius: 2px; }
.support .picture { border: 1.5px solid var(--muted); }
.answer { margin-top: 2px; font-size: 0.78rem; line-height: 1.3; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.right .answer { color: var(--learner); } .wrong .answer { color: var(--random); font-weight: 600; }
.right .picture { border-bottom: 3px solid var(--learner); } .wrong .picture { border: 2px solid var(--random); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 16px 22px;
  margin-top: 16px; }
.mistake { display: grid; grid-template-columns: repeat(3, 52px); gap: 0 10px; font-size: 0.76rem;
  color: var(--muted); line-height: 1.25; }
.mistake .caption { margin-top: 3px; }
.mistake .picture:nth-child(1) { border: 1.5px solid var(--muted); }
.mistake .picture:nth-child(2) { border: 2px solid var(--random); }
.mistake .picture:nth-child(3) { border: 2px solid var(--learner); }

.player { display: none; align-items: center; gap: 14px; margin-top: 18px; font-size: 0.92rem; }
.js .player { display: flex; flex-wrap: wrap; }
.player input { flex: 1 1 160px; max-width: 340px; accent-color: var(--learner); }
.player output { font-variant-numeric: tabular-nums; min-width: 9.5em; }
.player button { font: inherit; font-size: 0.88rem; color: var(--ink); background: var(--surface);
  border: 1px solid var(--rule); border-radius: 6px;
  padding: 4px 14px; cursor: pointer; }
.player button:hover { border-color: var(--muted); }
:focus-visible { outline: 2px solid var(--learner); outline-offset: 3px; }
[id*="-play-"] { display: none; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: 0.84rem; }

@media (max-width: 560px) {
  main { padding: 32px 18px 48px; }
  section { margin-top: 46px; }
  .stats { gap: 18px 20px; grid-template-columns: repeat(2, 1fr); }
  .stats dd { font-size: 1.45rem; }
  .classes { grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)); gap: 14px 8px; }
  .beside { grid-template-columns: minmax(0, 1fr); } .beside .legend { margin-top: 6px; gap: 4px; }
  .beside figcaption { margin-top: 10px; }
  table { font-size: 0.86rem; } th, td { padding: 7px 7px; }
  thead th:first-child, tbody th { min-width: 7.6em; max-width: 8.6em; white-space: normal; line-height: 1.3; }
  td .pm { display: block; margin-left: 0; } td.spans { white-space: normal; } td.spans .pm { display: inline;
    margin-left: 0.3em; }
  .scroll th:first-child { position: sticky; left: 0; background: var(--paper); padding-right: 12px; }
}
@media print {
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  section { margin-top: 26px; } figure, .task, tr, .cards > *, pre { break-inside: avoid; } p { break-inside: avoid; }
  h2, h3, section > p { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 16px 24px; } .figures.three { grid-template-columns: repeat(3, 1fr);
    gap: 12px 16px; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 14px 18px; } .stats { grid-template-columns: repeat(5, auto); }
  .stats dd { font-size: 1.25rem; } .facts, .legend, figcaption { font-size: 8.5pt; } .facts div { padding: 2px 0; }
  .pictures.query { grid-template-columns: repeat(3, 1fr); }
  .player, .js .player, details:not([open]) { display: none; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } th, td { padding: 4px 5px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
