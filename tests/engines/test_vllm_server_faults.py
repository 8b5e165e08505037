"""`rollout_backend: vllm_server` against servers that fail in every way that is planned for. None of them is real:
tests/engines/test_vllm_server.py has those."""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from grpo_stage.rollout.engines import vllm_server
from grpo_stage.rollout.engines.vllm_server import VLLMServers
from grpo_stage.rollout.engines.vllm_server_check import Wanted, check_servers
from grpo_stage.rollout.engines.vllm_server_fleet import Patience
from grpo_stage.types import AheadEngine, EngineLostError, Prompt, ReplicatedEngine

from .fake_server import FakeServer, end_of


MODEL = "a/model"
PROMPTS = [Prompt(index=i, token_ids=(20 + i, 30, 40), messages=(), reference=None) for i in range(6)]


def wanted(**changed) -> Wanted:
    return Wanted(
        **{
            "model": MODEL,
            "max_model_len": 512,
            "adapter": True,
            "max_lora_rank": 8,
            "folder": "/nowhere",
            "logprobs_mode": "processed_logprobs",
            **changed,
        }
    )


class Run:
    """An engine with its servers, and what it has warned of."""

    def __init__(self, tokenizer, num_servers=2, is_dev=False, scores_alone=False, ping=30.0, **changed) -> None:
        self.servers = [FakeServer(MODEL, is_dev=is_dev, has_lora=not is_dev) for _ in range(num_servers)]
        self.warnings: list[str] = []
        self.engine = VLLMServers(
            [server.url for server in self.servers],
            wanted(**changed),
            tokenizer,
            folder="/nowhere",
            limit_s=30.0,
            warn=self.warnings.append,
            scores_alone=scores_alone,
            patience=Patience(ping_every=0.05, ping=ping, rejoin=ping),
        )

    def end(self) -> None:
        end_of(self.engine, self.servers)


@pytest.fixture
def start(tokenizer) -> Iterator:
    runs: list[Run] = []

    def begin(*args, **kwargs) -> Run:
        runs.append(Run(tokenizer, *args, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(1)


@pytest.fixture(scope="module")
def undisturbed(policy, tokenizer):
    """What one server answers, by policy version."""
    run = Run(tokenizer, 1)

    def sampled(sampling, step):
        run.engine.sync(policy, step)
        return run.engine.generate(PROMPTS, sampling, step)

    yield sampled
    run.end()


def answers(groups):
    return [[(each.token_ids, each.sampling_logprobs) for each in group.completions] for group in groups]


def test_the_number_of_servers_changes_nothing_of_what_is_sampled(start, policy, sampling, undisturbed):
    run = start(3)
    assert isinstance(run.engine, AheadEngine)
    assert isinstance(run.engine, ReplicatedEngine)
    run.engine.sync(policy, 4)
    groups = run.engine.generate(PROMPTS, sampling, 4)
    assert answers(groups) == answers(undisturbed(sampling, 4))
    assert [group.prompt for group in groups] == PROMPTS
    assert {group.policy_version for group in groups} == {4}
    assert {each.text for group in groups for each in group.completions} != {""}
    assert run.engine.logprob_temperature == sampling.temperature
    assert len({each.token_ids for group in groups for each in group.completions}) == 18, "each has its own seed"
    assert all(server.num_generated >= 3 for server in run.servers), "every server has its share"


def test_a_version_has_a_name_of_its_own_and_only_the_last_is_held(start, policy, tokenizer):
    first, second = start(), start()
    names = []
    for run in (first, second):
        for version in (1, 2):
            run.engine.sync(policy, version)
            (held,) = run.servers[0].adapters
            assert [set(server.adapters) for server in run.servers] == [{held}] * 2
            names.append(held)
    assert len(set(names)) == 4, "vLLM's prefix cache would answer for a name that was used before"
    assert all(not body.get("load_inplace") for path, body in first.servers[0].log if "load_lora" in path)
    first.engine.close()
    assert [server.adapters for server in first.servers] == [{}, {}]
    first.engine.close()


@pytest.mark.parametrize("scores_alone", [False, True])
def test_each_replica_scores_by_itself(start, policy, sampling, scores_alone):
    run = start(scores_alone=scores_alone)
    under_way, most = [0], [0]

    def before(path, body):
        if body and body.get("sampling_params", {}).get("prompt_logprobs") is not None:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            time.sleep(0.005)
            under_way[0] -= 1

    run.servers[0].before = before
    run.engine.sync(policy, 1)
    groups = run.engine.generate(PROMPTS, sampling, 1)
    scores = run.engine.score(groups)
    assert (most[0] == 1) == scores_alone
    assert [len(own) for own in scores] == [12] * 18
    first, second = run.engine.score_each(groups).items()
    assert [first[0], second[0]] == [server.url for server in run.servers]
    for own, one, other in zip(scores, first[1], second[1], strict=True):
        torch.testing.assert_close(own, one)
        torch.testing.assert_close(own, other)
    run.servers[1].adapters = dict.fromkeys(run.servers[1].adapters, "another")
    wrong = run.engine.score_each(groups)[run.servers[1].url]
    assert not torch.equal(wrong[0], scores[0])


def test_weights_are_written_into_the_folder_of_the_run_and_removed(fake, policy, tokenizer, tmp_path):
    left = tmp_path / "_served_weights-of-a-run-that-was-killed"
    left.mkdir()
    server = fake()
    engine = VLLMServers([server.url], wanted(), tokenizer, folder=str(tmp_path), limit_s=30.0, warn=pytest.fail)
    for version in (1, 2):
        engine.sync(policy, version)
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 1, "the last version, which vLLM may read again"
    engine.close()
    assert list(tmp_path.iterdir()) == []


def broken_by(fault, server, after):
    """Have a server fail once it has got so many requests. Returns an event that says that it has."""
    lock, done, is_over = threading.Lock(), [], threading.Event()

    def before(path, body):
        with lock:
            if path == "/inference/v1/generate" and server.num_generated >= after and not done:
                done.append(True)
                fault()
                is_over.set()

    server.before = before
    return is_over


@pytest.mark.parametrize("fault", ["kill", "freeze", "restart", "errors"])
def test_the_prompts_of_a_server_that_fails_go_to_the_others(start, policy, sampling, undisturbed, fault):
    run = start(ping=2.0 if fault == "freeze" else 30.0)
    broken = run.servers[1]

    def restart():
        broken.kill()
        broken.start()

    def errors():
        broken.answer = lambda *_: (500, {"error": {"message": "EngineDeadError"}})

    run.engine.sync(policy, 7)
    broken_by({"kill": broken.kill, "freeze": broken.freeze, "restart": restart, "errors": errors}[fault], broken, 3)
    groups = run.engine.generate(PROMPTS, sampling, 7)
    assert answers(groups) == answers(undisturbed(sampling, 7))
    (warning,) = run.warnings
    assert f"{broken.url} is out" in warning
    said = {
        "kill": "Connect|Disconnect|Reset|OSError",
        "freeze": "no answer to /health within 2 s",
        "restart": "no longer knows|Connect|Disconnect|Reset|OSError",  # asked after, or in between
        "errors": "HTTP 500",
    }
    assert re.search(said[fault], warning)
    broken.before = lambda path, body: None
    asked = broken.num_generated
    run.engine.generate(PROMPTS, sampling, 8)
    assert broken.num_generated == asked, "nobody asks it before it has taken a version"


def test_a_server_rejoins_with_the_version_of_the_next_delivery(start, policy, sampling, undisturbed):
    run = start()
    broken = run.servers[0]
    run.engine.sync(policy, 1)
    broken.kill()
    run.engine.generate(PROMPTS, sampling, 1)
    run.engine.sync(policy, 2)
    assert len(run.warnings) == 1, "it is not there yet, which was said"
    broken.start()
    assert answers(run.engine.generate(PROMPTS, sampling, 2)) == answers(undisturbed(sampling, 2))
    assert broken.num_generated < 6, "it answers, and holds nothing of this run"
    run.engine.sync(policy, 3)
    assert f"{broken.url} is back" in run.warnings[1]
    assert answers(run.engine.generate(PROMPTS, sampling, 3)) == answers(undisturbed(sampling, 3))
    assert broken.num_generated > 6
    assert broken.adapters.keys() == run.servers[1].adapters.keys()


def test_a_server_that_comes_back_as_another_stays_out(start, policy, sampling):
    run = start()
    run.engine.sync(policy, 1)
    run.servers[0].kill()
    run.engine.generate(PROMPTS, sampling, 1)
    run.servers[0].model = "another/model"
    run.servers[0].start()
    run.engine.sync(policy, 2)
    assert "stays out" in run.warnings[1]
    assert "serves another/model" in run.warnings[1]
    run.engine.generate(PROMPTS, sampling, 2)
    assert run.servers[0].adapters == {}


def test_without_a_server_the_run_ends(start, policy, sampling):
    run = start()
    run.engine.sync(policy, 1)
    ends = [broken_by(server.kill, server, 2) for server in run.servers]
    with pytest.raises(EngineLostError, match="None of the 2 vLLM servers answers any more"):
        run.engine.generate(PROMPTS, sampling, 1)
    assert len(run.warnings) == 2
    assert all(end.wait(10) for end in ends)
    with pytest.raises(EngineLostError):
        run.engine.sync(policy, 2)
    run.servers[0].before = lambda path, body: None
    run.servers[0].start()
    run.engine.sync(policy, 3)
    assert len(run.engine.generate(PROMPTS, sampling, 3)) == 6


def test_a_request_that_one_server_fails_at_now_and_then_is_asked_again(
    start, policy, sampling, undisturbed, monkeypatch
):
    monkeypatch.setattr("grpo_stage.rollout.engines.vllm_server_fleet._PAUSE_S", 0.01)
    run = start(1)
    run.engine.sync(policy, 5)
    (server,) = run.servers
    answer, failed = server.answer, []

    def flaky(method, path, body):
        if path == "/inference/v1/generate" and len(failed) < 2:
            failed.append(body["sampling_params"]["seed"])
            return 503, {"error": {"message": "busy"}}
        return answer(method, path, body)

    server.answer = flaky
    assert answers(run.engine.generate(PROMPTS, sampling, 5)) == answers(undisturbed(sampling, 5))
    assert run.warnings == []
    seeds = [body["sampling_params"]["seed"] for path, body in server.log if path == "/inference/v1/generate"]
    assert all(seeds.count(seed) >= 2 for seed in failed), "with the seed that it had"


def test_whole_weights_are_forgotten_by_a_server_that_was_started_anew(start, policy, sampling):
    """It serves the base under the name of the policy: only its instance tells."""
    run = start(2, is_dev=True, adapter=False)
    run.engine.sync(policy, 1)
    routes = [path for path, _ in run.servers[0].log]
    assert routes == ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    expected = answers(run.engine.generate(PROMPTS, sampling, 1))
    run.servers[1].kill()
    run.servers[1].start()
    assert answers(run.engine.generate(PROMPTS, sampling, 1)) == expected
    assert "started anew" in run.warnings[0]
    assert run.servers[1].num_generated > 9, "it has answered, and its answers were thrown away"
    assert run.engine.score_each(run.engine.generate(PROMPTS[:1], sampling, 1)).keys() == {run.servers[0].url}


def test_the_next_rollout_is_sampled_meanwhile(start, policy, sampling, undisturbed):
    run = start()
    run.engine.sync(policy, 3)
    for server in run.servers:
        server.freeze()
    run.engine.submit(PROMPTS, sampling, 3)
    with pytest.raises(AssertionError, match="under way"):
        run.engine.sync(policy, 4)
    for server in run.servers:
        server.thaw()
    groups, seconds = run.engine.collect()
    assert answers(groups) == answers(undisturbed(sampling, 3))
    assert seconds > 0
    run.engine.submit(PROMPTS, sampling, 4)
    run.engine.discard()
    run.engine.sync(policy, 5)
    assert len(run.engine.generate(PROMPTS, sampling, 5)) == 6
    assert run.warnings == []


def test_a_stop_ends_a_rollout(start, policy, sampling):
    run = start()
    run.engine.sync(policy, 1)
    for server in run.servers:
        server.freeze()

    def stop() -> None:
        raise KeyboardInterrupt

    run.engine.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        run.engine.generate(PROMPTS, sampling, 1)
    run.engine.on_step = lambda: None
    for server in run.servers:
        server.thaw()
    assert len(run.engine.generate(PROMPTS, sampling, 1)) == 6


def test_what_the_servers_refuse_ends_the_run(start, policy, sampling):
    run = start()
    with pytest.raises(RuntimeError, match="before sync"):
        run.engine.generate(PROMPTS, sampling, 1)
    run.servers[1].max_lora_rank = 1
    with pytest.raises(ValueError, match=r"does not take the adapter in .*rank 4 is greater.*grpo-stage serve"):
        run.engine.sync(policy, 1)
    with pytest.raises(RuntimeError, match="before sync"):
        run.engine.generate(PROMPTS, sampling, 1)


def check(keys: SimpleNamespace) -> None:
    check_servers(keys, is_first_rank=True)


def recipe(*servers, **changed) -> SimpleNamespace:
    values = {
        "vllm_server_urls": ",".join(server.url for server in servers),
        "model_name_or_path": MODEL,
        "vllm_maxlen": 256,
        "structured_outputs": None,
        "finetuning_type": "lora",
        "vllm_lora": "native",
        "vllm_max_lora_rank": 8,
        "vllm_server_transfer": "files",
        "output_dir": "/nowhere",
        "num_generations": 4,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    return SimpleNamespace(**values | changed)


@pytest.fixture
def fake() -> Iterator:
    started = []

    def start(**own) -> FakeServer:
        started.append(FakeServer(**{"model": MODEL, **own}))
        return started[-1]

    yield start
    for server in started:
        with contextlib.suppress(OSError):
            server.kill()


def test_only_one_rank_tries_the_servers_out(fake):
    server = fake(mode="raw_logits")
    check_servers(recipe(server), is_first_rank=False)
    assert server.log == []
    server.version = "0.12.0"
    with pytest.raises(ValueError, match="has vLLM"):
        check_servers(recipe(server), is_first_rank=False)


def test_fit_servers_are_let_through(fake):
    check(recipe(fake(), fake()))
    check(recipe(fake(mode="raw_logprobs"), top_p=0.9))
    check(recipe(fake(is_dev=True, has_lora=False, takes_adapters=False), finetuning_type="full"))


def test_servers_are_asked_from_a_notebook_too(fake):
    async def cell() -> None:  # a thread that runs an event loop cannot run a second one
        check(recipe(fake()))

    with ThreadPoolExecutor() as threads:  # the browser's tests leave a loop in this one
        threads.submit(asyncio.run, cell()).result()


@pytest.mark.parametrize(
    ("own", "keys", "said"),
    [
        ({"version": "0.12.0"}, {}, ["has vLLM 0.12.0", "0.23"]),
        ({"model": "other/model"}, {}, ["serves other/model", "`model_name_or_path: a/model`", "--served-model-name"]),
        ({"max_model_len": 128}, {}, ["up to 128 tokens", "needs 256", "`vllm_maxlen`"]),
        ({"max_model_len": 256}, {"structured_outputs": {"regex": "a"}}, ["up to 256 tokens", "needs 257"]),
        ({"takes_adapters": False}, {}, ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]),
        ({"has_lora": False}, {}, ["without `--enable-lora`"]),
        ({"max_lora_rank": 4}, {}, ["no room for an adapter of rank 8", "--max-lora-rank 8"]),
        ({"mode": "raw_logprobs"}, {}, ["gives raw_logprobs", "`--logprobs-mode processed_logprobs`"]),
        ({"mode": "raw_logits"}, {}, ["gives something that is no log-probabilities"]),
        ({}, {"min_p": 0.1}, ["gives processed_logprobs", "`--logprobs-mode raw_logprobs`"]),
        ({}, {"finetuning_type": "full"}, ["VLLM_SERVER_DEV_MODE=1"]),
        ({"is_dev": True}, {"finetuning_type": "full"}, ["`--enable-lora`", "cannot reload whole weights"]),
        ({"api_key": "secret"}, {}, ["asks for another API key", "VLLM_API_KEY"]),
    ],
)
def test_an_unfit_server_is_refused_with_its_remedy(fake, own, keys, said):
    server = fake(**own)
    with pytest.raises(ValueError, match=re.escape(f"The vLLM server {server.url} of `vllm_server_urls`")) as error:
        check(recipe(fake(), server, **keys) if not keys else recipe(server, **keys))
    for part in said:
        assert part in str(error.value)


def test_servers_of_two_versions_are_refused(fake):
    with pytest.raises(ValueError, match=r"has 0\.23\.0, .* has 0\.23\.1"):
        check(recipe(fake(), fake(version="0.23.1")))


def test_a_folder_that_the_server_does_not_see_is_refused(fake, monkeypatch):
    server = fake()
    monkeypatch.setattr(
        server, "_adapter", lambda route, body: (404, {"error": {"message": "No adapter found for x"}})
    )
    with pytest.raises(ValueError, match="`output_dir: /nowhere` on a disk that the server has"):
        check(recipe(server))


def test_an_address_without_a_server_is_refused(fake):
    server = fake()
    server.kill()
    with pytest.raises(ValueError, match=f"{server.url} .*cannot be used.*`grpo-stage serve`"):
        check(recipe(server))


def test_the_key_comes_from_the_environment(fake, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = fake(api_key="secret")
    check(recipe(server))
    server.api_key = "other"
    with pytest.raises(ValueError, match="asks for another API key") as error:
        check(recipe(server))
    assert "secret" not in str(error.value)


class Ranks:
    """Two ranks in two threads: what `distributed` does between processes."""

    def __init__(self, monkeypatch) -> None:
        self._barrier, self._values, self._own = threading.Barrier(2, timeout=30), [None, None], threading.local()
        monkeypatch.setattr(vllm_server, "process_index", lambda: getattr(self._own, "rank", 0))
        monkeypatch.setattr(vllm_server, "all_gather", self._gathered)

    def _gathered(self, value):
        self._values[self._own.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def alone(self, work):
        """What `work` returns in a run of one rank."""
        with pytest.MonkeyPatch.context() as one:
            one.setattr(vllm_server, "process_index", lambda: 0)
            one.setattr(vllm_server, "all_gather", lambda value: [value])
            return work()

    def each(self, work):
        """What `work` returns or raises on each rank."""

        def on(rank):
            self._own.rank = rank
            try:
                return work(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on, range(2)))


def test_of_several_ranks_one_delivers_and_all_sample(start, policy, sampling, undisturbed, monkeypatch, tokenizer):
    ranks = Ranks(monkeypatch)
    run = start()
    engines = [
        run.engine,
        VLLMServers(
            [s.url for s in run.servers],
            wanted(),
            tokenizer,
            folder="/nowhere",
            limit_s=30.0,
            warn=run.warnings.append,
        ),
    ]

    def sampled(rank):
        engines[rank].sync(policy, 6)
        return answers(engines[rank].generate(PROMPTS[rank::2], sampling, 6))

    expected = ranks.alone(lambda: answers(undisturbed(sampling, 6)))
    assert ranks.each(sampled) == [expected[0::2], expected[1::2]]
    loads = [path for server in run.servers for path, _ in server.log if path == "/v1/load_lora_adapter"]
    assert len(loads) == 2, "each server takes the version once"
    run.servers[0].kill()
    assert ranks.each(sampled) == [expected[0::2], expected[1::2]]
    run.servers[1].max_lora_rank = 1
    own, other = ranks.each(sampled)
    assert isinstance(own, ValueError)
    assert isinstance(other, ValueError)
    assert "On rank 0: The vLLM server" in str(other)
    run.servers[1].kill()
    assert [type(error) for error in ranks.each(sampled)] == [EngineLostError] * 2
    ranks.each(lambda rank: engines[rank].close())
