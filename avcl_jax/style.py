"""The style sheet that reports and the page of the fingerprint index share."""

STYLE = """
:root { color-scheme: light dark; --font: ui-sans-serif, system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; --ink: #1b1f24; --muted: #5d6672; --line: #dfe3e8;
  --paper: #f6f7f9; --card: #ffffff; --accent: #2b6fb8; --good: #1f8a5b; --bad: #c0392b;
  --heat: 43, 111, 184; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #9aa4b0; --line: #30363e;
  --paper: #101317; --card: #181c21; --accent: #6aaaf0; --good: #4cc38a; --bad: #ff7b6b;
  --heat: 80, 150, 230; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--font); }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 20px 0 8px; }
p { margin: 0 0 12px; max-width: 78ch; }
.lead { color: var(--muted); font-size: 16px; }
.caption { color: var(--muted); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 24px 26px; margin-top: 22px; }
figure { margin: 0; }
svg { width: 100%; height: auto; display: block; }
figure svg { fill: currentColor; }
figure svg text { font-family: var(--font) !important; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px;
  margin-top: 22px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 25px; white-space: nowrap;
  line-height: 1.2; letter-spacing: -0.02em; }
.tile span { color: var(--muted); font-size: 13px; line-height: 1.4; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr));
  gap: 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
svg + .scroll { margin-top: 20px; }
th, td { text-align: right; padding: 5px 12px; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.definitions td { text-align: left; }
.row { display: grid; grid-template-columns: repeat(6, minmax(165px, 1fr)); gap: 10px;
  padding: 12px 0; border-top: 1px solid var(--line); }
.video { border: 1px solid var(--line); border-radius: 8px; padding: 7px; min-width: 0;
  font-size: 12px; line-height: 1.35; }
.video.query { border: 2px solid var(--accent); padding: 6px; }
.video.hit { border: 2px solid var(--good); padding: 6px; }
.video .tag { color: var(--muted); display: block; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.video .tag b { color: var(--ink); }
.video.query .tag b { color: var(--accent); }
.video.hit .tag b { color: var(--good); }
.stage { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: pointer;
  position: relative; margin: 5px 0; font: inherit; }
.stage[disabled] { cursor: default; }
.stage video { width: 100%; border-radius: 4px; display: block; }
.stills { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px; }
.stills img, .stage > img { width: 100%; display: block; border-radius: 3px; }
.stage > img { height: 48px; margin-top: 3px; }
.unseen { opacity: 0.28; }
.matrices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr));
  gap: 26px; }
.matrix td, .matrix th { border: 0; padding: 0; text-align: center; font-size: 12px; height: 30px;
  min-width: 38px; }
.matrix th { padding: 0 6px; color: var(--muted); }
.matrix th:first-child { text-align: right; padding-right: 8px; }
.matrix td { border: 2px solid var(--card); border-radius: 5px; }
.note { border-left: 3px solid var(--bad); padding: 6px 0 6px 12px; margin: 10px 0; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 600px) { main { padding: 20px 12px 40px; } section { padding: 16px 14px; }
  figure { overflow-x: auto; } figure > svg { min-width: 600px; } .charts figure > svg {
  min-width: 0; } }
footer { color: var(--muted); font-size: 13px; margin-top: 26px; }
"""
