// Where the clip lies in the source, and how much each piece of it resembles the source there.
import { clock, element } from "/format.js";

const SVG = "http://www.w3.org/2000/svg";
const STRONGEST = 8;

export class Timeline {
  constructor(place, seek) {
    this.place = place;
    this.seek = seek;
    this.needles = [];
  }

  show(clip, match, threshold) {
    this.clip = clip.compared_seconds;
    this.needles = [];
    const end = match.offset_seconds + match.rate * this.clip;
    const from = Math.min(0, match.offset_seconds), to = Math.max(match.duration_seconds, end);
    const share = (seconds) => (100 * (seconds - from)) / (to - from);
    const bar = (className, start, stop, title) => {
      const made = element("i", { className, title });
      made.style.left = `${share(start)}%`;
      made.style.width = `${share(stop) - share(start)}%`;
      return made;
    };
    const clipLane = lane("lane", bar("clip-bar", match.offset_seconds, end, "the clip"));
    const sourceLane = lane("lane");
    const whole = bar("", 0, match.duration_seconds, "the source");
    whole.className = "lane whole";
    whole.style.position = "absolute";
    sourceLane.append(whole, ...match.intervals.map((interval) => bar("agree",
      interval.reference_start, interval.reference_end,
      `alike from ${clock(interval.reference_start)} to ${clock(interval.reference_end)}`)));
    this.needle(sourceLane, (time) => share(match.offset_seconds + match.rate * time));
    this.needle(clipLane, (time) => share(match.offset_seconds + match.rate * time));
    const overview = lanes(["Clip", clipLane], ["Source", sourceLane],
      ["", axis(from, to, (time) => clock(time, to - from < 20 ? 1 : 0))]);
    const detail = lanes(
      ["Clip", axis(0, this.clip, (time) => clock(time))],
      ["Video", this.stripes(match, "video")],
      ["Audio", this.stripes(match, "audio")],
      ["Source", axis(0, this.clip, (time) => clock(match.offset_seconds + match.rate * time))]);
    this.place.replaceChildren(
      element("h3", { textContent: "Where the clip lies in the source" }), overview,
      element("h3", { textContent: "How much each piece of the clip resembles it there" }), detail,
      element("p", { className: "key" },
        element("span", {}, element("i", { className: "high" }),
          `alike, by 2 to ${STRONGEST} or more standard deviations above chance`),
        element("span", {}, element("i", { className: "low" }), "not above chance")),
      table(match));
  }

  // A needle per lane, moved by `move`.
  needle(lane, share) {
    const made = element("i", { className: "needle" });
    lane.append(made);
    this.needles.push((time) => { made.style.left = `${share(time)}%`; });
  }

  move(time) {
    for (const needle of this.needles) needle(time);
  }

  stripes(match, modality) {
    const made = lane("lane detail");
    const scores = match.segments.filter((segment) => segment[modality] !== null);
    if (!scores.length) {
      made.append(element("span", { className: "none", textContent: "not compared" }));
      return made;
    }
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${this.clip} 1`);
    svg.setAttribute("preserveAspectRatio", "none");
    // Else hairlines of the background show between neighbours.
    svg.setAttribute("shape-rendering", "crispEdges");
    svg.setAttribute("role", "img");
    const alike = scores.filter((segment) => segment[modality] >= 2).length;
    svg.setAttribute("aria-label", `${alike} of ${scores.length} pieces are alike`);
    const middles = match.segments.map((s) => (s.query_start + s.query_end) / 2);
    match.segments.forEach((segment, number) => {
      const score = segment[modality];
      if (score === null) return;
      // Segments overlap: each is drawn around its middle, the outermost up to the clip's ends.
      const left = number ? (middles[number - 1] + middles[number]) / 2 : 0;
      const right = number + 1 < middles.length ? (middles[number] + middles[number + 1]) / 2
        : this.clip;
      const stripe = document.createElementNS(SVG, "rect");
      stripe.setAttribute("x", left);
      stripe.setAttribute("width", right - left);
      stripe.setAttribute("height", 1);
      stripe.setAttribute("class", score >= 2 ? "stripe-yes" : "stripe-no");
      if (score >= 2) stripe.style.opacity = 0.35 + 0.65 * Math.min(1, (score - 2) / (STRONGEST - 2));
      const title = document.createElementNS(SVG, "title");
      title.textContent = `${clock(segment.query_start)} to ${clock(segment.query_end)}: ` +
        `${score.toFixed(1)}`;
      stripe.append(title);
      svg.append(stripe);
    });
    made.append(svg);
    made.addEventListener("click", (event) => {
      const box = made.getBoundingClientRect();
      this.seek(((event.clientX - box.left) / box.width) * this.clip);
    });
    this.needle(made, (time) => (100 * time) / this.clip);
    return made;
  }
}

function lane(className, ...children) {
  return element("div", { className }, ...children);
}

function lanes(...rows) {
  const made = element("div", { className: "lanes" });
  for (const [label, content] of rows) {
    made.append(element("span", { textContent: label }), content);
  }
  return made;
}

function axis(from, to, text) {
  const made = element("div", { className: "axis" });
  const count = innerWidth < 640 ? 3 : 5;
  for (let n = 0; n <= count; n += 1) {
    const label = element("span", { textContent: text(from + ((to - from) * n) / count) });
    label.style.left = `${(100 * n) / count}%`;
    made.append(label);
  }
  return made;
}

function table(match) {
  const number = (value) => (value === null ? "–" : value.toFixed(1));
  const row = (cells, name) => element("tr", {},
    ...cells.map((textContent) => element(name, { textContent })));
  return element("details", {}, element("summary", { textContent: "All pieces as numbers" }),
    element("div", { className: "scroll" }, element("table", {},
      row(["clip", "source", "video", "audio"], "th"),
      ...match.segments.map((segment) => row([
        `${clock(segment.query_start)} – ${clock(segment.query_end)}`,
        clock(match.offset_seconds + match.rate * segment.query_start),
        number(segment.video), number(segment.audio)], "td")))));
}
