"""The page in a real Chromium: a clip is dropped, and its source plays beside it.

Screenshots go to the directory that AVCL_SCREENSHOTS names, to be looked at.
"""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path

import pytest

from tests.fingerprint.page_server import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PATIENCE_MS = 300_000
sync_api.expect.set_options(timeout=PATIENCE_MS)

TITLE = "film <b>.mp4"


@pytest.fixture(scope="module")
def server(page_library, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("page_tmp") / "tmp"
    with running(page_library.directory, temporary, "--max-upload-mb=2") as process:
        yield process


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        # Where tests run as root there is no sandbox, and containers have little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, server, request):
    """Opens the page; at the end nothing may have failed in it, and nothing have left the host.

    `opened.expected` takes what the browser itself says of an answer that the test provokes.
    """
    contexts, complaints, requests = [], [], []

    def opened(**options):
        context = chromium.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type} {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: requests.append(asked.url))
        page.goto(server.address)
        sync_api.expect(page.locator("#about")).to_contain_text("13 sources")
        return page

    opened.expected = []
    yield opened
    for number, context in enumerate(contexts):
        if "AVCL_SCREENSHOTS" in os.environ:
            name = f"{request.node.name}-{number}.png".replace("/", "_")
            path = Path(os.environ["AVCL_SCREENSHOTS"]) / name
            context.pages[0].screenshot(path=path, full_page=True)
        context.close()
    assert [c for c in complaints if not any(e in c for e in opened.expected)] == []
    ours = (server.address, f"blob:{server.address}", "data:")
    assert [url for url in requests if not url.startswith(ours)] == []
    assert requests


def drop(page, path: Path) -> None:
    """Drops a file on the page as a file manager does."""
    page.evaluate(
        """([name, content]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            for (const kind of ["dragenter", "dragover", "drop"]) {
                document.getElementById("drop").dispatchEvent(new DragEvent(
                    kind, { dataTransfer, bubbles: true, cancelable: true }));
            }
        }""",
        [path.name, base64.b64encode(path.read_bytes()).decode()],
    )


def wait(page, condition: str, offset: float = 0.0) -> None:
    """Waits for a condition on the two players; Playwright's own way is against the page's CSP.

    "loaded", or "played": more than a second, both, with the source this offset after the clip.
    """
    page.evaluate(
        """([condition, offset, patience]) => new Promise((resolve, reject) => {
            const begin = performance.now();
            const look = () => {
                const states = [clip, source].map((p) => [p.readyState, p.seeking, p.paused]);
                const distance = source.currentTime - clip.currentTime - offset;
                const holds = {
                    loaded: states.every(([ready, seeking]) => ready >= 2 && !seeking),
                    played: clip.currentTime > 1.5 && states.every((state) => !state[2])
                        && !source.seeking && Math.abs(distance) < 0.2,
                }[condition];
                if (holds) resolve();
                else if (performance.now() - begin > patience) {
                    reject(new Error(`not ${condition}: ${JSON.stringify([states, distance])}`));
                } else {
                    // On a slow machine the clip may end before a frame is drawn.
                    if (condition === "played" && clip.ended) play.click();
                    requestAnimationFrame(look);
                }
            };
            look();
        })""",
        [condition, offset, PATIENCE_MS],
    )


def distance(page, offset: float) -> float:
    """Seconds by which the source's picture is away from where the clip's lies in it."""
    return page.evaluate("(offset) => source.currentTime - clip.currentTime - offset", offset)


def test_a_dropped_clip_plays_beside_its_source(open_page, clips):
    page = open_page()
    drop(page, clips / "film.mp4")
    shows(page, badge="Match", headline=TITLE)
    assert page.evaluate("document.activeElement.id") == "headline"
    assert page.locator("b b").count() == 0  # a name is no markup
    sync_api.expect(page.locator("#figures .tile").nth(1)).to_contain_text("0:03")
    wait(page, "loaded")
    assert page.evaluate("clip.videoWidth * source.videoWidth") > 0
    assert distance(page, 3.0) == pytest.approx(0, abs=0.2)

    offset = distance(page, 0)
    page.get_by_role("button", name="Play").click()
    wait(page, "played", offset)
    page.get_by_role("button", name="Pause").click()
    assert page.evaluate("clip.paused && source.paused")

    # By keyboard alone, and where the source is moved, not played.
    page.locator("#seek").focus()
    page.keyboard.press("End")
    wait(page, "loaded")
    assert page.evaluate("clip.currentTime") > 3.5
    assert distance(page, offset) == pytest.approx(0, abs=0.1)
    page.get_by_label("clip", exact=True).check()
    assert page.evaluate("source.muted && !clip.muted")
    stripes = page.locator("#timeline rect.stripe-yes")
    assert stripes.count() > 10


def shows(page, **texts: str) -> None:
    """Waits until elements, by id, have these texts."""
    for name, words in texts.items():
        sync_api.expect(page.locator(f"#{name}")).to_contain_text(words)


def fits(page, width: int) -> bool:
    return page.evaluate("document.documentElement.scrollWidth") <= width


def test_candidates_are_chosen_by_keyboard_and_shown(open_page, clips):
    page = open_page()
    page.set_input_files("#file", clips / "film.mp4")
    rows = page.locator("#candidates button")
    sync_api.expect(rows.first).to_have_attribute("aria-current", "true")
    other = page.locator("#candidates button", has_text=".mkv").first
    other.focus()
    page.keyboard.press("Enter")
    sync_api.expect(other).to_have_attribute("aria-current", "true")
    sync_api.expect(rows.first).to_have_attribute("aria-current", "false")
    shows(page, **{"source-role": "Not a match"})
    # Of an MPEG-4 that browsers do not play, so that what loads was converted.
    wait(page, "loaded")
    assert "/preview" in page.evaluate("source.currentSrc")


def test_a_clip_that_browsers_do_not_play_is_shown_converted(open_page, clips):
    page = open_page(color_scheme="dark")
    drop(page, clips / "old.mkv")
    shows(page, headline="old film.mkv")
    wait(page, "loaded")
    assert "/clips/" in page.evaluate("clip.currentSrc")
    assert page.evaluate("clip.videoWidth * source.videoWidth") > 0
    # The clip begins at 8 s, the conversion 5 s before it.
    assert distance(page, 5.0) == pytest.approx(0, abs=0.2)


def test_sound_alone_is_drawn_on_a_phone_and_the_same_file_is_said(open_page, page_library, clips):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    shows(page, invitation="Choose a clip")
    page.set_input_files("#file", clips / "sound.wav")
    shows(page, headline="sound.wav")
    wait(page, "loaded")
    for name in ("clip", "source"):
        sync_api.expect(page.locator(f"#{name}-spectrogram")).to_be_visible()
        inked = f"""() => {{ const canvas = document.getElementById("{name}-spectrogram");
            const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return image.data.filter((value, n) => n % 4 === 3 && value > 128).length; }}"""
        assert page.evaluate(inked) > 500
    assert fits(page, 360)
    page.set_input_files("#file", page_library.directory.parent / "media" / TITLE)
    shows(page, badge="Same file", explanation="is the same file as")
    assert fits(page, 360)


def test_shared_by_two_sources_and_no_match_are_said_plainly(open_page, clips):
    page = open_page()
    drop(page, clips / "trailer.mkv")
    shows(page, badge="Shared by 2 sources", explanation="2 sources match trailer.mkv")
    # Both are named, in the order of their scores.
    headline = page.locator("#headline").inner_text()
    assert sorted(headline.split(" and ")) == ["other 3.mkv", "trailer.mkv"]
    shows(page, **{"source-role": "One of 2 sources"})
    drop(page, clips / "foreign.mp4")
    shows(page, badge="No match", headline="No source found for foreign.mp4")
    sync_api.expect(page.locator("#view")).to_be_hidden()
    # The nearest can be looked at all the same.
    page.locator("#candidates button", has_text=".mkv").first.click()
    sync_api.expect(page.locator("#view")).to_be_visible()
    wait(page, "loaded")


@pytest.mark.parametrize("width", [1280, 375])
def test_what_has_to_match_is_chosen_and_asked_again(open_page, clips, width):
    page = open_page(viewport={"width": width, "height": 800})
    page.set_input_files("#file", clips / "dubbed.mkv")
    only = "only the audio matches"
    shows(page, badge="Match", explanation=only, candidates=only)
    # The same clip again, without choosing it again.
    page.get_by_label("A match needs").select_option("video and audio")
    needs = f"but a match needs the video and the audio, and {only}."
    shows(page, badge="No match", explanation=needs)
    page.get_by_label("A match needs").select_option("video or audio")
    shows(page, badge="Match")
    page.set_input_files("#file", clips / "silent.mkv")
    shows(page, remark="In silent.mkv, the audio is silent: only the video was compared.")
    assert fits(page, width)


def test_what_cannot_be_compared_is_said_and_the_next_clip_is(open_page, clips, tmp_path):
    page = open_page()
    open_page.expected.append("status of 413")
    drop(page, clips / "notes.mp4")
    shows(page, error="notes.mp4 cannot be compared: not a video")
    huge = tmp_path / "huge.mp4"
    with huge.open("wb") as file:
        file.truncate(2 << 30)  # a hole, which takes no place
    page.set_input_files("#file", huge)
    shows(page, error="huge.mp4 has 2.0\u00a0GB, at most 2.0\u00a0MB")
    sync_api.expect(page.locator("#work")).to_be_hidden()
    drop(page, clips / "film.mp4")
    shows(page, headline=TITLE)
    sync_api.expect(page.locator("#error")).to_be_hidden()
    # As if the page did not know the limit: what the server says of three megabytes.
    page.evaluate("Object.defineProperty(File.prototype, 'size', { get: () => 1 })")
    big = {"name": "big.mp4", "mimeType": "video/mp4", "buffer": b"x" * (3 << 20)}
    page.set_input_files("#file", big)
    shows(page, error="at most 2 MB are taken")
