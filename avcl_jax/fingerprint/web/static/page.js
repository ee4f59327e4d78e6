// The page: takes a clip, says what is being done with it, and shows what was found.
import { bytes, chance, clock, element, plural } from "/format.js";
import { Player } from "/player.js";
import { Timeline } from "/timeline.js";

// Where nothing hovers, nothing is dropped either.
const WAYS = matchMedia("(hover: none)").matches ? ["Choose a clip", "Choose another clip"]
  : ["Drop a clip here, or choose one", "Drop another clip, or choose one"];

const at = (id) => document.getElementById(id);
const timeline = new Timeline(at("timeline"), (seconds) => player.seek(seconds));
const player = new Player((seconds) => timeline.move(seconds));
let status = null, running = null, clipAddress = null, last = null;

async function readStatus() {
  try {
    status = await (await fetch("/api/status")).json();
  } catch {
    showError("The server does not answer: start `avcl-fingerprint serve` again.");
    return;
  }
  if (status.error) {
    at("about").textContent = `Index ${status.index}`;
    showError(status.error);
  } else {
    at("about").textContent = `Looks among ${plural(status.sources, "source")} ` +
      `(${plural(status.segments, "segment")}) in ${status.index}.`;
  }
  at("needs").hidden = status.modalities.length < 2;
  at("limits").textContent = `Video or audio of ${status.shortest_seconds.toFixed(1)} s or more, ` +
    `up to ${bytes(status.max_upload_bytes)}. ` +
    `The first ${Math.round(status.max_seconds)}\u00a0seconds are compared.`;
}

function showError(message, name = null) {
  // A sentence begins with a capital, a file's name as it does.
  const first = name !== null && message.startsWith(name) ? message[0] : message[0].toUpperCase();
  at("error").textContent = first + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
  at("error").hidden = false;
}

function clear() {
  player.clear();
  for (const id of ["error", "verdict", "view", "others"]) at(id).hidden = true;
  document.body.classList.remove("answered");
}

function ask(file) {
  last = file;
  running?.abort();
  clear();
  if (status && file.size > status.max_upload_bytes) {
    showError(`${file.name} has ${bytes(file.size)}, at most ${bytes(status.max_upload_bytes)} ` +
      "are taken: cut it, or start the server with a larger --max-upload-mb", file.name);
    return;
  }
  at("doing-what").textContent = file.name;
  doing("is being sent …", 0);
  at("work").hidden = false;
  document.body.classList.add("busy");
  running = send(file);
}

function doing(what, share = null) {
  at("doing").textContent = what;
  if (share === null) at("progress").removeAttribute("value");
  else at("progress").value = share;
}

const STAGES = {
  waiting: (line) => line.before
    ? `waits for ${plural(line.before, "clip")} before it …` : "has arrived …",
  decoding: () => "is being decoded …",
  comparing: () => "is being compared with the index …",
};

// XMLHttpRequest, because fetch does not tell how much of a body has been sent.
function send(file) {
  const request = new XMLHttpRequest();
  const require = at("require").value ? `&require=${at("require").value}` : "";
  request.open("POST", `/api/query?name=${encodeURIComponent(file.name)}${require}`);
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.setRequestHeader("Accept", "application/x-ndjson");
  request.upload.onprogress = (event) => doing("is being sent …", event.loaded / event.total);
  request.upload.onload = () => doing("has arrived …");
  let read = 0;
  const readLines = () => {
    if (request.status !== 200) return;
    let end;
    while ((end = request.responseText.indexOf("\n", read)) >= 0) {
      const line = JSON.parse(request.responseText.slice(read, end));
      read = end + 1;
      if (line.stage) doing(STAGES[line.stage](line));
      if (line.error) fail(line.error);
      if (line.answer) show(line.answer, file);
    }
  };
  const finish = () => {
    running = null;
    at("work").hidden = true;
    document.body.classList.remove("busy");
    at("file").value = "";
  };
  const fail = (message) => { finish(); showError(message, file.name); };
  request.onprogress = readLines;
  request.onload = () => {
    readLines();
    if (request.status !== 200) {
      let message = `the server answers ${request.status}: try again`;
      try { message = JSON.parse(request.responseText).error; } catch { /* no JSON, said above */ }
      fail(message);
    } else if (running === request) fail("the server stopped in the middle: look at its messages");
  };
  request.onerror = () => fail(
    "the connection broke: the server was stopped, or refused the clip while it was being sent");
  request.onabort = finish;
  const show = (answer, file) => { finish(); showAnswer(answer, file); };
  request.send(file);
  return request;
}

function showAnswer(answer, file) {
  document.body.classList.add("answered");
  at("invitation").textContent = WAYS[1];
  if (clipAddress) URL.revokeObjectURL(clipAddress);
  clipAddress = URL.createObjectURL(file);
  const { match } = answer;
  // All that match, and for comparison a few that do not.
  const candidates = answer.candidates.filter((c, number) => c.accepted || number < 6);
  const nearest = match ?? candidates[0];
  const shared = answer.verdict === "shared";
  at("badge").textContent = { "same file": "Same file", match: "Match", "no match": "No match",
    shared: shared && `Shared by ${sources(sharing(nearest, answer).length, answer)}` }[answer.verdict];
  at("badge").className = match ? "badge" : "badge none";
  at("headline").textContent = match ? match.title
    : shared ? listed(sharing(nearest, answer).map((c) => c.title))
      : `No source found for ${answer.clip.name}`;
  at("explanation").textContent = explanation(answer, nearest);
  at("remark").textContent = `In ${answer.clip.name}, ${answer.clip.remark}.`;
  at("remark").hidden = !answer.clip.remark;
  at("figures").replaceChildren(...(match ? figures(match, answer.threshold) : []));
  at("figures").hidden = !match;
  at("verdict").hidden = false;
  const accepted = candidates.filter((candidate) => candidate.accepted);
  const shown = candidates.length > (match ? 1 : 0);
  at("others").hidden = !shown;
  at("others-title").textContent = accepted.length > 1
    ? `${plural(accepted.length, "matching source")} of ${plural(candidates.length, "candidate")}`
    : match ? "All candidates" : "Nearest sources";
  at("others-caption").textContent =
    `A score of ${answer.threshold} or more is a match: at most one unrelated clip in ` +
    `${Math.round(10 ** answer.threshold)} reaches it` +
    (answer.required.length ? `, and its ${answer.required.join(" and ")} must match. ` : ". ") +
    "Choose one to see it beside the clip.";
  const top = Math.max(2 * answer.threshold, ...candidates.map((c) => c.score));
  at("candidates").replaceChildren(
    ...candidates.map((candidate) => candidateRow(candidate, answer, top)));
  if (match || shared) choose(match ?? nearest, answer);
  at("headline").focus();
}

function explanation(answer, nearest) {
  const { clip, match, required, threshold, verdict } = answer;
  const part = clip.seconds > clip.compared_seconds + 1
    ? ` Only its first ${clock(clip.compared_seconds, 0)} of ${clock(clip.seconds, 0)} were compared.`
    : "";
  if (verdict === "same file") {
    return `${clip.name} is the same file as ${listed(answer.sources)}.${part}`;
  }
  if (match) {
    const others = answer.candidates.filter((c) => c.accepted && c.id !== match.id).length;
    const more = others ? ` ${plural(others, "other source")} ${others > 1 ? "match" : "matches"} ` +
      "a part of it, see below." : "";
    const begins = match.offset_seconds < -0.05
      ? `${match.source} begins at ${clock(-match.offset_seconds / match.rate)} of ${clip.name}`
      : `${clip.name} begins at ${clock(match.offset_seconds)} of ${match.source}`;
    return `${begins}; ${match.what_matched}. ${chance(match.score)} scores as high.${more}${part}`;
  }
  if (verdict === "shared") {
    return `${sources(sharing(nearest, answer).length, answer)} match ${clip.name} equally well: ` +
      "copies of one film, or sources with the same logo or trailer. Nothing in the clip tells " +
      `which one it was taken from. For ${nearest.title}, ${nearest.what_matched}.${part}`;
  }
  if (!nearest) return `No source resembles it at all.${part}`;
  if (nearest.score >= threshold) {
    return `The nearest, ${nearest.title}, scores ${nearest.score.toFixed(1)}, but a match needs ` +
      `the ${required.join(" and the ")}, and ${nearest.what_matched}.${part}`;
  }
  return `No source resembles it more than unrelated clips do. The nearest, ${nearest.title}, ` +
    `scores ${nearest.score.toFixed(1)}; a match needs ${threshold.toFixed(1)}.${part}`;
}

// A candidate and all that match as well.
function sharing(candidate, answer) {
  return [candidate, ...answer.candidates.filter((c) => candidate.shared_with.includes(c.source))];
}

function listed(names) {
  const shown = names.length > 4 ? [...names.slice(0, 3), `${names.length - 3} more`] : names;
  return shown.length > 1 ? `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}` : shown[0];
}

function sources(count, answer) {
  return `${count >= answer.at_most ? "at least " : ""}${plural(count, "source")}`;
}

function figures(match, threshold) {
  const rate = match.rate.toFixed(2);
  const tempo = rate === "1.00" ? "plays at the source's speed"
    : match.rate > 1 ? "the clip is faster than the source" : "the clip is slower than the source";
  const entries = [
    [match.score.toFixed(1), `score; a match has ${threshold.toFixed(1)} or more`],
    [clock(match.offset_seconds), "where the clip begins in the source"],
    [`${rate}×`, tempo],
  ];
  const evidence = (value, of) => value === null ? ["–", `${of} not compared`]
    : [value.toFixed(1), `evidence of the ${of}; 0 is chance`];
  entries.push(evidence(match.video_score, "video"), evidence(match.audio_score, "audio"));
  return entries.map(([figure, what]) => element("div", { className: "tile" },
    element("b", { textContent: figure }), element("span", { textContent: what })));
}

function candidateRow(candidate, answer, top) {
  const meter = element("span", { className: candidate.accepted ? "meter yes" : "meter" },
    element("i"));
  meter.firstChild.style.width = `${Math.max(0, Math.min(1, candidate.score / top)) * 100}%`;
  const button = element("button", { type: "button", title: candidate.source },
    element("span", { className: candidate.accepted ? "title yes" : "title",
      textContent: candidate.title }),
    meter,
    element("small", { textContent: `score ${candidate.score.toFixed(1)}` }),
    element("small", { className: "rate", textContent: `at ${clock(candidate.offset_seconds)}` }),
    ...(candidate.accepted ? [element("small", { className: "parts",
      textContent: parts(candidate, answer) })] : []));
  button.dataset.id = candidate.id;
  button.addEventListener("click", () => choose(candidate, answer));
  return element("li", {}, button);
}

// What of the clip matches what of a source, in words.
function parts(candidate, answer) {
  const where = candidate.intervals.map((interval) =>
    `${clock(interval.query_start)} to ${clock(interval.query_end)} of the clip is ` +
    `${clock(interval.reference_start)} to ${clock(interval.reference_end)} of the source` +
    (interval.shared_by > 1 ? `, shared by ${sources(interval.shared_by, answer)}` : ""));
  return [candidate.what_matched, ...where].join("; ");
}

function choose(candidate, answer) {
  at("view").hidden = false;
  for (const button of at("candidates").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.dataset.id === candidate.id));
  }
  at("clip-name").textContent = answer.clip.name;
  at("source-name").textContent = candidate.title;
  at("source-name").title = candidate.source;
  at("source-role").textContent = !candidate.accepted ? "Not a match"
    : candidate.shared_with.length ? `One of ${sources(sharing(candidate, answer).length, answer)}`
      : "Source";
  document.querySelector(".pane.source").classList.toggle("accepted", candidate.accepted);
  timeline.show(answer.clip, candidate, answer.threshold);
  player.show(answer.clip, answer.clip.converted_url ?? clipAddress, candidate);
}

at("file").addEventListener("change", (event) => {
  if (event.target.files.length) ask(event.target.files[0]);
});
at("require").addEventListener("change", () => { if (last) ask(last); });
// The whole page takes a drop: a clip that misses the box would otherwise replace the page.
let over = 0;
addEventListener("dragenter", () => { over += 1; document.body.classList.add("over"); });
addEventListener("dragleave", () => { if (--over <= 0) document.body.classList.remove("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
});
at("invitation").textContent = WAYS[0];
readStatus();
