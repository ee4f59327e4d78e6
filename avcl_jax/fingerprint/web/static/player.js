// Two players on one clock: what the source shows is always where the clip lies in it.
import { clock } from "/format.js";
import { drawSpectrogram } from "/spectrogram.js";

const at = (id) => document.getElementById(id);
const LATE_SECONDS = 0.25, DRIFT_SECONDS = 0.04;

export class Player {
  constructor(moved) {
    this.moved = moved;
    this.clip = at("clip");
    this.source = at("source");
    this.playing = false;
    this.round = 0;
    at("play").addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    at("seek").addEventListener("input", () => this.seek(Number(at("seek").value)));
    at("hear").addEventListener("change", () => this.hear());
    this.clip.addEventListener("ended", () => this.pause());
    for (const name of ["clip", "source"]) {
      this[name].addEventListener("loadedmetadata", () => this.loaded(name));
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  clear() {
    this.pause();
    this.round += 1;
    for (const element of [this.clip, this.source]) {
      element.removeAttribute("src");
      element.load();
    }
  }

  async show(clip, clipAddress, match) {
    this.clear();
    const round = this.round;
    this.match = match;
    this.seconds = clip.compared_seconds;
    this.start = 0;
    this.spectrograms = { clip: clip.spectrogram, source: null };
    at("seek").max = this.seconds;
    for (const name of ["clip", "source"]) {
      at(`${name}-absent`).hidden = true;
      at(`${name}-spectrogram`).hidden = true;
      this[name].closest(".screen").classList.remove("heard");
    }
    at("pair").classList.remove("stacked");
    this.hear();
    this.load("clip", [clipAddress], round);
    const whole = match.media.url ? [match.media.url] : [];
    if (match.media.error) this.absent("source", match.media.error);
    else {
      if (!match.media.url) this.absent("source", "This part of the source is being converted …");
      this.load("source", [...whole, match.media.converted_url], round);
    }
    this.seek(match.intervals.length ? match.intervals[0].query_start : 0);
  }

  // Addresses are tried in turn: what one browser plays, another may not.
  load(name, addresses, round) {
    const element = this[name];
    const [address, ...rest] = addresses;
    if (name === "source") {
      this.start = address === this.match.media.url ? 0 : this.match.media.converted_start_seconds;
    }
    element.onerror = async () => {
      if (round !== this.round || !element.getAttribute("src")) return;
      if (rest.length) { this.load(name, rest, round); return; }
      this.absent(name, name === "clip" ? "This browser cannot play the clip."
        : await reason(address));
    };
    element.src = address;
    element.load();
  }

  absent(name, message) {
    at(`${name}-absent`).textContent = message;
    at(`${name}-absent`).hidden = false;
  }

  async loaded(name) {
    const round = this.round;
    at(`${name}-absent`).hidden = true;
    this.shape();
    this.place(name);
    // The only sign that there is no video.
    if (this[name].videoWidth) return;
    if (name === "source") {
      const answer = await fetch(this.match.media.spectrogram_url);
      if (round !== this.round || !answer.ok) return;
      this.spectrograms.source = await answer.json();
    }
    if (!this.spectrograms[name]) return;
    this[name].closest(".screen").classList.add("heard");
    at(`${name}-spectrogram`).hidden = false;
    const both = !at("clip-spectrogram").hidden && !at("source-spectrogram").hidden;
    at("pair").classList.toggle("stacked", both);
    this.draw();
  }

  // Both screens have the shape of the wider video, so that the two can be compared.
  shape() {
    const shapes = [this.clip, this.source].filter((element) => element.videoWidth)
      .map((element) => element.videoWidth / element.videoHeight);
    const shape = shapes.length ? Math.max(0.8, Math.min(2.4, Math.max(...shapes))) : 16 / 9;
    at("pair").style.setProperty("--shape", shape);
  }

  draw() {
    if (!this.match) return;
    const reaches = { clip: [0, this.seconds],
      source: [this.map(0) + this.start, this.map(this.seconds) + this.start] };
    for (const name of ["clip", "source"]) {
      if (this.spectrograms[name] && !at(`${name}-spectrogram`).hidden) {
        drawSpectrogram(at(`${name}-spectrogram`), this.spectrograms[name], ...reaches[name],
          name === "clip" ? "--accent" : "--good");
      }
    }
    this.tell();
  }

  // Time of the clip -> time in the source's player.
  map(seconds) {
    return this.match.offset_seconds + this.match.rate * seconds - this.start;
  }

  get now() {
    return this.clip.readyState ? this.clip.currentTime : Number(at("seek").value);
  }

  seek(seconds) {
    const time = Math.max(0, Math.min(seconds, this.seconds));
    at("seek").value = time;
    if (this.clip.readyState) this.clip.currentTime = time;
    if (this.source.readyState) this.source.currentTime = this.inside(this.map(time));
    this.tell(time);
  }

  place(name) {
    const time = Number(at("seek").value);
    if (name === "clip") this.clip.currentTime = time;
    else this.source.currentTime = this.inside(this.map(time));
    this.tell(time);
  }

  inside(time) {
    return Math.max(0, Math.min(time, (this.source.duration || Infinity) - 0.01));
  }

  async play() {
    if (!this.clip.readyState) return;
    if (this.clip.ended || this.now >= this.seconds - 0.05) this.seek(0);
    this.playing = true;
    this.button();
    this.source.playbackRate = this.match.rate;
    try {
      await this.clip.play();
    } catch {
      this.pause();
      return;
    }
    const follow = () => {
      if (!this.playing) return;
      this.follow();
      requestAnimationFrame(follow);
    };
    follow();
  }

  follow() {
    const time = this.clip.currentTime;
    if (time >= this.seconds) { this.pause(); return; }
    at("seek").value = time;
    this.tell(time);
    const source = this.source;
    if (!source.readyState || source.seeking) return;
    const wanted = this.map(time), end = source.duration || Infinity;
    if (wanted < 0 || wanted >= end) {
      if (!source.paused) source.pause();
      return;
    }
    const late = wanted - source.currentTime;
    if (Math.abs(late) > LATE_SECONDS) source.currentTime = wanted;
    else {
      // A small distance is caught up with unheard; a jump would be seen.
      const catching = Math.abs(late) > DRIFT_SECONDS ? Math.max(-0.15, Math.min(0.15, late)) : 0;
      source.playbackRate = this.match.rate * (1 + catching);
    }
    if (source.paused) source.play().catch(() => {});
  }

  pause() {
    this.playing = false;
    this.clip.pause();
    this.source.pause();
    this.button();
  }

  hear() {
    const chosen = document.querySelector("input[name=hear]:checked").value;
    this.clip.muted = chosen !== "clip";
    this.source.muted = chosen !== "source";
  }

  button() {
    at("play").textContent = this.playing ? "Pause" : "Play";
    at("play").setAttribute("aria-pressed", String(this.playing));
  }

  tell(time = this.now) {
    if (!this.match) return;
    const there = this.match.offset_seconds + this.match.rate * time;
    at("time").textContent = `${clock(time)} / ${clock(this.seconds)}`;
    at("seek").setAttribute("aria-valuetext",
      `${clock(time)} of the clip, ${clock(there)} of the source`);
    for (const name of ["clip", "source"]) {
      const needle = this[name].closest(".screen").querySelector(".needle");
      needle.hidden = at(`${name}-spectrogram`).hidden;
      needle.style.left = `${(100 * time) / this.seconds}%`;
    }
    this.moved(time);
  }
}

async function reason(address) {
  try {
    const answer = await fetch(address);
    if (!answer.ok) return (await answer.json()).error;
  } catch { /* the server is gone */ }
  return "This browser cannot play the source.";
}
