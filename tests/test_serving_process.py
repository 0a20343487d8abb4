"""The server as a process: the clients that people use, signals, load, the page in a browser."""

import asyncio
import os
import shutil
import signal
import time

import httpx
import pytest
from helpers import make_run
from serving import ask_for, measure, server

from jaxfusion.data.rows.examples import Example
from jaxfusion.runs.open_run import open_run

pytestmark = pytest.mark.slow
TEXTS = ["la ru so. bako dimofu", "Premise: a b c Hypothesis: d", "අ ආ ඇ"]


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "mine"
    make_run(path, tiny, "transformer_softmax")
    return path


@pytest.fixture(scope="module")
def served(workdir):
    with server(workdir) as (process, base):
        yield process, base


def test_the_openai_client_gets_what_eval_gives_streamed_or_not(served, workdir):
    import openai

    client = openai.OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0)
    assert [x.id for x in client.models.list()] == ["mine", "llm"]
    for model in ("mine", "llm"):
        run = open_run(workdir, {"max_new_tokens": 9}, llm_only=model == "llm")
        with run.on_mesh():
            wanted = run.scorer(run.task)(run.params, [Example(x, "", -1) for x in TEXTS],
                                          run.task).answers
        for text, answer in zip(TEXTS, wanted, strict=True):
            fields = {"model": model, "max_tokens": 9,
                      "messages": [{"role": "user", "content": text}]}
            whole = client.chat.completions.create(**fields)
            assert whole.choices[0].message.content == answer
            stream = client.chat.completions.create(**fields, stream=True)
            assert "".join(x.choices[0].delta.content or "" for x in stream) == answer
    fields = {"model": "llm", "prompt": TEXTS, "max_tokens": 5, "logprobs": 3, "echo": True}
    choices = client.completions.create(**fields).choices
    assert len(choices) == 3 and choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(openai.BadRequestError, match="is told none"):
        client.chat.completions.create(model="mine", extra_body={"language": "si"}, messages=[
            {"role": "user", "content": "a"}])
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")


def test_lm_eval_gets_what_our_own_model_of_it_gives(served, workdir, tiny):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from jaxfusion.runs.lm_harness import JaxFusion

    class Request:
        def __init__(self, *args):
            self.args = args

    ours = JaxFusion(str(workdir), llm_only=True)
    theirs, of_texts = (LocalCompletionsAPI(
        f"{served[1]}/v1/completions", model="llm", tokenizer_backend="huggingface",
        tokenizer=str(tiny / "decoder"), add_bos_token=bos, batch_size=3) for bos in (True, False))
    asked = [Request(text, f" {word}") for text in TEXTS for word in ("bako", "la ru so", "sings")]
    for (found, greedy), (wanted, likeliest) in zip(
            theirs.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert found == pytest.approx(wanted, abs=1e-4) and greedy == likeliest
    rolling = [Request(text) for text in TEXTS]
    # Which puts the first token in front by itself.
    assert of_texts.loglikelihood_rolling(rolling) == pytest.approx(
        ours.loglikelihood_rolling(rolling), abs=1e-3)
    until = [Request(text, {"until": ["so"], "max_gen_toks": 8}) for text in TEXTS]
    assert [x.strip() for x in theirs.generate_until(until)] == ours.generate_until(until)


def running(base):
    """How many prompts are being answered."""
    lines = httpx.get(f"{base}/metrics").text.splitlines()
    return float(next(x for x in lines if x.startswith("jaxfusion_running_prompts ")).split()[1])


def long_stream(base, **fields):
    """A stream of an answer that takes seconds."""
    body = {"model": "llm", "prompt": "la", "max_tokens": 500, "stream": True, **fields}
    return httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=120)


def test_an_answer_that_nobody_reads_is_not_finished(served):
    with long_stream(served[1]) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert running(served[1]) == 1
    end = time.monotonic() + 2
    while running(served[1]) and time.monotonic() < end:
        time.sleep(0.05)
    assert running(served[1]) == 0
    with pytest.raises(httpx.ReadTimeout):  # not streamed, and given up
        httpx.post(f"{served[1]}/v1/completions", timeout=0.2, json={
            "model": "llm", "prompt": "la", "max_tokens": 500})
    time.sleep(1)
    assert running(served[1]) == 0


def test_sigterm_lets_a_stream_end_and_takes_no_more(workdir):
    with server(workdir) as (process, base):
        with long_stream(base) as reply:
            lines = reply.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{base}/health")
            rest = [line for line in lines if line]
        assert first.startswith("data: ") and rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        assert process.wait(30) == 0


def test_a_load_gets_answers_and_memory_stays(served):
    result = asyncio.run(measure(*served, clients=64, seconds=20, warm=20))
    assert set(result["statuses"]) <= {"200", "429"} and result["all"]["requests"] > 100
    memory = result["memory_mib"]
    assert memory["after"] < 1.1 * memory["before"] + 30, memory


def test_it_starts_again_on_its_port_when_killed_under_load(workdir):
    async def load(base, process):
        asked = asyncio.create_task(ask_for(base, 16, 6))
        await asyncio.sleep(3)
        process.kill()
        return await asked

    with server(workdir) as (process, base):
        statuses = {status for _, status, _ in asyncio.run(load(base, process))}
        assert statuses == {200, 0}
    with server(workdir, f"--port={base.rpartition(':')[2]}") as (_, again):
        assert again == base and httpx.get(f"{base}/health").status_code == 200


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def resize(driver, width):
    """Makes the page as wide as a phone's or a desktop's."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})


def script(driver, code):
    """What an expression of the page's is."""
    return driver.execute_script(f"return {code}")


def wait_for(driver, code):
    """Waits until an expression of the page's is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 60).until(lambda _: script(driver, code))


def type_and_run(driver, texts):
    """Types the columns' texts and presses Run by the keyboard; waits for everything."""
    from selenium.webdriver.common.keys import Keys

    areas = driver.find_elements("css selector", "textarea")
    for area, text in zip(areas, texts, strict=True):
        area.clear()
        area.send_keys(text)
    areas[-1].send_keys(Keys.CONTROL, Keys.ENTER)
    wait_for(driver, "document.body.getAttribute('aria-busy') === 'false'"
                     " && !document.getElementById('layers').hidden")


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_answers_and_shows_layers_in_both_themes(served, workdir, browser, width):
    resize(browser, width)
    browser.get(served[1])
    wait_for(browser, "document.querySelectorAll('#chips button').length > 5")
    type_and_run(browser, ["la ru so", "بچوں کو"])
    text = "Premise: la ru so Hypothesis: بچوں کو Label: "
    run = open_run(workdir)
    with run.on_mesh():
        answer, = run.scorer(run.task)(run.params, [Example(text, "", -1)], run.task).answers
    assert script(browser, "document.querySelector('.bridge .answer').textContent") == answer
    assert script(browser, "document.querySelectorAll('.llm .bars tr').length") == 3
    cells = script(browser, "[...document.querySelectorAll('#heat tbody tr')].map(row => "
                            "[...row.cells].map(cell => cell.textContent))")
    weights = run.layers_of(text)
    assert [row[0] for row in cells] == weights["tokens"]
    assert [[float(x) for x in row[1:]] for row in cells] == [
        [pytest.approx(100 * x, abs=0.06) for x in row] for row in weights["weights"]]
    assert "layer 1" in script(browser, "document.querySelector('#heat td').title")
    areas = "[...document.querySelectorAll('textarea')].map(x => x.matches(':dir(rtl)'))"
    assert script(browser, areas) == [False, True]
    grounds = []
    for _ in range(2):
        grounds.append(script(browser, "getComputedStyle(document.body).backgroundColor"))
        browser.find_element("id", "theme").click()
        assert script(browser, "document.documentElement.scrollWidth <= innerWidth")
        keep_picture(browser, f"{width}_{len(grounds)}")
    assert len(set(grounds)) == 2
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
    hosts = script(browser, "[...new Set(performance.getEntriesByType('resource')"
                            ".map(x => new URL(x.name).origin))]")
    assert hosts == [served[1]]


def keep_picture(driver, name):
    """Saves what the page looks like, where JAXFUSION_SCREENSHOTS names a folder."""
    if folder := os.environ.get("JAXFUSION_SCREENSHOTS"):
        driver.save_screenshot(f"{folder}/{name}.png")


def test_the_page_asks_once_for_the_token(workdir, browser):
    with server(workdir, "--token=open sesame") as (_, base):
        browser.get(base)
        for given in ("wrong", "open sesame"):
            wait_for(browser, "document.getElementById('token-dialog').open")
            browser.find_element("id", "token").send_keys(given)
            browser.find_element("css selector", "#token-dialog button").click()
            time.sleep(0.5)
        wait_for(browser, "document.querySelectorAll('#chips button').length > 5")
        browser.refresh()
        wait_for(browser, "document.querySelectorAll('#chips button').length > 5")
        type_and_run(browser, ["la", "ru"])
