"""scripts/export: what transformers opens is the model, and what comes back is the checkpoint."""

import doctest
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.nanochat import NanoChatForCausalLM

from nanochat.common import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.infer import huggingface
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingSettings
from nanochat.text import tokenizer_json
from nanochat.text.tokenizer import RustBPETokenizer, TiktokenTokenizer
from nanochat.text.tokenizer_base import SPECIAL_TOKENS, SPLIT_PATTERN
from nanochat.tracking import Tracker
from nanochat.train import checkpoint_read, checkpoint_write
from tests.support.runs import run_here

pytestmark = pytest.mark.long

TEXTS = (
    "hello there, it's what IT'LL be: two and three, 12345 x_1\n\n\tend  ",
    "你好\uff0c世界\uff01今天天气很好。 이것은 한국어 שלום עולם",
    "naïve café 👩🏽‍🚀🎉 e\u0301 \u00a0\u2028\x00\x85 ﬁ \u017f İ ² ½ ٣",
)
CONTEXT = 96
USER = {"role": "user", "content": TEXTS[1]}
CONVERSATIONS = (
    [USER],
    [
        {"role": "system", "content": " be brief\n"},
        USER,
        {"role": "assistant", "content": "  ok \n"},
        USER,
    ],
    [USER, {"role": "assistant", "content": ""}, {"role": "user", "content": "\n{{ 2 }}<b>\n"}],
    [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "it is "},
                {"type": "python", "text": "2*3"},
                {"type": "python_output", "text": "6"},
                {"type": "text", "text": ""},
            ],
        },
    ],
)
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint with grouped queries and padding of the vocabulary, and its exported folder."""
    base_dir = tmp_path_factory.mktemp("export")
    tokenizer = RustBPETokenizer.train_from_iterator(list(TEXTS) * 2, 340)
    tokenizer.save(base_dir / "tokenizer")
    config = GPTConfig(CONTEXT, 340, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.wte.weight[:2, 0] = torch.tensor([-0.0, 1e-42])
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 0, 1, 0, base_dir)
    meta = {"stage": "chatsft", "model_config": asdict(config)}
    meta["tokenizer_fingerprint"] = tokenizer.fingerprint()
    stage_dir = base_dir / "chatsft_checkpoints"
    checkpoint_write.save(stage_dir, "tiny", 7, model.state_dict(), {}, meta, runtime)
    tracker = Tracker(stage_dir / "tiny", runtime, "chat_eval_sft", {})
    for kind, step, accuracy in (("task", 7, 0.375), ("early", 5, 0.125), ("late", 9, 0.625)):
        tracker.log(kind, step, task="Sums", accuracy=accuracy)
    tracker.close()
    folder = base_dir / "out"
    assert str(folder) in export(base_dir, "--checkpoint=tiny", f"--output={folder}")
    return SimpleNamespace(
        base_dir=base_dir, folder=folder, model=model.eval(), tokenizer=tokenizer,
        theirs=AutoModelForCausalLM.from_pretrained(folder),
        their_tokenizer=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip


def export(base_dir: Path, *words: str) -> str:
    return run_here(base_dir, "python -m scripts.export", *words)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_logits(world: SimpleNamespace) -> None:
    theirs, loading = AutoModelForCausalLM.from_pretrained(world.folder, output_loading_info=True)
    assert type(theirs) is NanoChatForCausalLM
    assert not any(loading.values()), loading
    ids = torch.randint(340, (2, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, logits = world.model(ids), theirs(ids).logits
    assert ours.std() > 1
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=0)


def test_ids(world: SimpleNamespace) -> None:
    """Whatever is in a text, names of special tokens included; <|bos|> where it is asked for."""
    draw = random.Random(0)
    marks = [*SPECIAL_TOKENS, *"".join(TEXTS), "'S", "\r\n", "\u3000", "\U000e0001", "9" * 7]
    odd = ["".join(draw.choices(marks, k=draw.randint(0, 40))) for _ in range(300)]
    for text in (*TEXTS, *SPECIAL_TOKENS, *odd):
        ids = world.tokenizer.encode(text)
        assert ids_of(world.their_tokenizer, text) == ids
        assert world.their_tokenizer.decode(ids) == text
    assert world.their_tokenizer("hi")["input_ids"] == world.tokenizer.encode("hi", "<|bos|>")


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_template(world: SimpleNamespace, messages: list[dict]) -> None:
    render = world.their_tokenizer.apply_chat_template
    ids, _ = world.tokenizer.render_conversation({"messages": messages})
    assert render(messages, return_dict=False) == ids
    prompt = [*ids, world.tokenizer.encode_special("<|assistant_start|>")]
    assert render(messages, return_dict=False, add_generation_prompt=True) == prompt


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ([{"role": "user", "content": "a <|user_end|> b"}], "user_end"),
        ([USER, USER], "assistant is next"),
        ([{"role": "assistant", "content": "x"}], "user is next"),
        ([{"role": "system", "content": "x"}], "followed"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be a text"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "image"),
    ],
)
def test_chat_template_refuses(world: SimpleNamespace, messages: list[dict], part: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=part):
        world.their_tokenizer.apply_chat_template(messages, tokenize=False)


def test_greedy_answers_and_chat(world: SimpleNamespace) -> None:
    engine = Engine(world.model, world.tokenizer)
    chat = pipeline("text-generation", model=world.theirs, tokenizer=world.their_tokenizer)
    greedy = {"max_new_tokens": 32, "do_sample": False}
    lengths = set()
    for text in ("hello", TEXTS[1], "12345", "naïve"):
        messages = [{"role": "user", "content": text}]
        prompt = world.their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        answer = world.theirs.generate(**prompt, **greedy)[0, prompt["input_ids"].shape[1] :]
        request = Request(prompt["input_ids"][0].tolist(), 32, SamplingSettings(temperature=0.0))
        ours = [event.token for event in engine.complete([request])[0].events]
        assert answer.tolist() == ours
        lengths.add(len(ours))
        said = chat(messages, **greedy)[0]["generated_text"][-1]
        special = {world.tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
        words = world.tokenizer.decode([token for token in ours if token not in special])
        assert said == {"role": "assistant", "content": words}
    assert max(lengths) > 3


def test_the_other_files(world: SimpleNamespace) -> None:
    """The card has the results of this step alone; who may read one file may read all."""
    card = (world.folder / "README.md").read_text(encoding="utf-8")
    assert "| Sums | 0.375 |" in card
    assert "0.125" not in card
    assert "0.625" not in card
    assert "library_name: transformers" in card
    assert len({file.stat().st_mode for file in world.folder.iterdir()}) == 1
    config = json.loads((world.folder / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == list(Engine(world.model, world.tokenizer).stop_tokens)


def test_there_and_back(world: SimpleNamespace, tmp_path: Path) -> None:
    """Bit for bit, padding and signs of zero included; with the tokenizer where there is none."""
    assert "chatsft_checkpoints/tiny/000007" in export(tmp_path, f"--from_hf={world.folder}")
    path = checkpoint_read.find("tiny", "chatsft", tmp_path)
    state, original = checkpoint_read.load_model_state(path), world.model.state_dict()
    assert state.keys() == original.keys()
    for name, weight in original.items():
        assert torch.equal(state[name].view(torch.int32), weight.view(torch.int32)), name
    before = checkpoint_read.load_meta(checkpoint_read.find("tiny", "chatsft", world.base_dir))
    after = checkpoint_read.load_meta(path)
    assert {name: after[name] for name in ("stage", "tag", "step", "model_config")} == {
        name: before[name] for name in ("stage", "tag", "step", "model_config")
    }
    ranks = "tokenizer/tokenizer_ranks.json"
    assert (tmp_path / ranks).read_bytes() == (world.base_dir / ranks).read_bytes()
    again = tmp_path / "again"
    export(tmp_path, f"--output={again}")
    for file in world.folder.iterdir():
        if file.name != "README.md":
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_transformers_saved_comes_back(world: SimpleNamespace, tmp_path: Path) -> None:
    """In bfloat16, without our files: no padding, the stage by flag, the tag by the folder."""
    folder = tmp_path / "tuned"
    theirs = AutoModelForCausalLM.from_pretrained(world.folder, dtype=torch.bfloat16)
    theirs.save_pretrained(folder)
    world.their_tokenizer.save_pretrained(folder)
    export(tmp_path, f"--from_hf={folder}", "--source=base")
    path = checkpoint_read.find("tuned", "base", tmp_path)
    state = checkpoint_read.load_model_state(path)
    assert torch.equal(state["lm_head.weight"][:340], theirs.lm_head.weight.float())
    assert not state["lm_head.weight"][340:].any()


def test_folders_are_replaced_only_when_told(world: SimpleNamespace, tmp_path: Path) -> None:
    words = ("--checkpoint=tiny", f"--output={tmp_path / 'out'}")
    (tmp_path / "out").mkdir()
    export(world.base_dir, *words)
    with pytest.raises(SystemExit, match=r"2: error: .*--overwrite"):
        export(world.base_dir, *words)
    (tmp_path / "out" / "model.safetensors").write_text("old")
    for left_by_a_kill in (".out.tmp", ".out.old"):
        shutil.copytree(tmp_path / "out", tmp_path / left_by_a_kill)
    export(world.base_dir, *words, "--overwrite")
    assert load_file(tmp_path / "out" / "model.safetensors").keys()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match=r"2: error: .*no exported model"):
        export(world.base_dir, "--checkpoint=tiny", f"--output={foreign}", "--overwrite")
    with pytest.raises(SystemExit, match=r"2: error: .*000007 exists"):
        export(world.base_dir, f"--from_hf={world.folder}")
    export(world.base_dir, f"--from_hf={world.folder}", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "out"], "something is left"


def test_a_write_that_fails_leaves_the_old_folder(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--checkpoint=tiny", f"--output={tmp_path / 'out'}", "--overwrite")
    export(world.base_dir, *words)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SystemExit, match=r"2: error: .*No space"):
        export(world.base_dir, *words)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def setting(file: str, **values: object) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | values), encoding="utf-8")

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (setting("config.json", model_type="llama"), "model_type 'llama'"),
        (setting("config.json", hidden_act="gelu"), "hidden_act 'gelu'"),
        (setting("config.json", final_logit_softcapping=None), "final_logit_softcapping None"),
        (setting("config.json", tie_word_embeddings=True), "tie_word_embeddings True"),
        (setting("config.json", intermediate_size=100), "intermediate_size 100"),
        (setting("config.json", rms_norm_eps=1e-5), "rms_norm_eps 1e-05"),
        (setting("config.json", rope_parameters={"rope_theta": 5e5}), "rope_parameters"),
        (setting("config.json", rope_scaling={"type": "yarn"}), "rope_scaling"),
        (setting("config.json", rope_parameters="yarn"), "rope_parameters 'yarn'"),
        (setting("config.json", num_attention_heads=0), "n_head = 0"),
        (setting("config.json", hidden_size="64"), "n_embd = '64'"),
        (setting("config.json", max_position_embeddings=None), "no max_position_embeddings"),
        (setting("nanochat.json", step="x"), "step 'x'"),
        (setting("nanochat.json", tag="../up"), "tag '../up'"),
        (setting("nanochat.json", stage="none"), "stage 'none'"),
        (setting("config.json", quantization_config={"bits": 4}), "quantization_config"),
        (setting("config.json", vocab_size=341), "340 tokens, config.json 341"),
        (setting("tokenizer.json", normalizer={"type": "NFC"}), "another normalizer"),
        (setting("tokenizer.json", added_tokens=[]), "special tokens {}"),
        (setting("tokenizer.json", pre_tokenizer=None), "another pre_tokenizer"),
        (setting("tokenizer.json", model=[]), "no byte-level BPE"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "no byte-level BPE"),
        (tensors(lambda w: w.pop(HEAD)), "lack .*lm_head"),
        (tensors(lambda w: w.update(extra=torch.ones(1))), "extra"),
        (tensors(lambda w: w.update({HEAD: w[HEAD][:-1].clone()})), r"\(339, 64\)"),
        (tensors(lambda w: w.update({HEAD: w[HEAD].int()})), "torch.int32"),
        (lambda f: (f / "model.safetensors").write_text("x"), "damaged"),
        (lambda f: (f / "config.json").write_text("x"), "no JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
    ],
)
def test_what_cannot_come_back(
    world: SimpleNamespace, tmp_path: Path, edit: Edit, part: str
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(world.folder, folder)
    edit(folder)
    with pytest.raises(SystemExit, match=f"2: error: .*{part}"):
        export(tmp_path / "base", f"--from_hf={folder}")
    assert not (tmp_path / "base" / "tokenizer").exists()
    assert not (tmp_path / "base" / "chatsft_checkpoints").exists()


def test_another_tokenizer_is_not_overwritten(world: SimpleNamespace, tmp_path: Path) -> None:
    RustBPETokenizer.train_from_iterator(list(TEXTS), 300).save(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match=r"2: error: .*another tokenizer.*--tokenizer_dir"):
        export(tmp_path, f"--from_hf={world.folder}")
    export(tmp_path, f"--from_hf={world.folder}", f"--tokenizer_dir={tmp_path / 'other'}")
    with pytest.raises(SystemExit, match=r"2: error: .*vocabulary of 340"):
        export(tmp_path)


def test_quantized_weights_are_refused(world: SimpleNamespace) -> None:
    path = checkpoint_read.find("tiny", "chatsft", world.base_dir)
    meta = checkpoint_read.load_meta(path) | {"quantized_weights": {"precision": "mxfp4"}}
    stage_dir, runtime = (
        path.parents[1],
        Runtime(torch.device("cpu"), torch.float32, 0, 0, 1, 0, Path()),
    )
    checkpoint_write.save(stage_dir, "packed", 1, {}, {}, meta, runtime)
    with pytest.raises(SystemExit, match=r"2: error: .*quantized_weights.*mxfp4"):
        export(world.base_dir, "--checkpoint=packed")


BYTES = {bytes([i]): i for i in range(256)}


@pytest.mark.parametrize(
    ("ranks", "pattern", "part"),
    [
        (BYTES | {b"abc": 256}, SPLIT_PATTERN, "no merge of two"),
        (BYTES | {b"<|bos|>": 256}, SPLIT_PATTERN, "learned '<|bos|>'"),
        ({bytes([i]): i for i in range(255)}, SPLIT_PATTERN, "no token for byte 255"),
        (BYTES, r"\w+", "splits text by"),
    ],
)  # fmt: skip
def test_tokenizers_that_the_format_cannot_express(
    ranks: dict[bytes, int], pattern: str, part: str
) -> None:
    with pytest.raises(ValueError, match=part.replace("|", r"\|")):
        tokenizer_json.to_json(TiktokenTokenizer.from_ranks(ranks, pattern))


def test_the_split_is_the_same_at_every_character() -> None:
    """Two engines with Unicode tables of their own: each class of the pattern, every code point."""
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    for part in (r"\p{L}", r"\p{N}", r"\s", "(?i:[sdmt])", "(?i:ll|ve|re)"):
        ours = TiktokenTokenizer.from_ranks(BYTES, part)  # drops what does not match
        matched = ours.decode(ours.encode(every))
        removed = tokenizers.pre_tokenizers.Split(tokenizers.Regex(part), "removed")
        kept = "".join(piece for piece, _ in removed.pre_tokenize_str(every))
        assert set(kept) == set(every) - set(matched), part


@pytest.mark.parametrize("module", [huggingface, tokenizer_json])
def test_worked_examples(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 4
    assert not result.failed
