"""Models loaded from our own files, at any cut, are those loaded from Hugging Face's: bit for bit, on any ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.models.test_families import CAUSAL, assert_equal, batch
from tests.models.test_real_models import run_load_under_watch
from tp_attention import models
from tp_attention.checkpoint import reshard
from tp_attention.cli import app
from tp_attention.comm import TPGroup
from tp_attention.models.embedding import embed, tokenize

FAMILIES = [*CAUSAL, "bert"]
PROMPT = "The capital of France is"
TEXTS = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply today."]


def weights(folder, rank, size, **options):
    """What `rank` of `size` loads, without other ranks being there."""
    group = TPGroup(rank, size, torch.device("cpu"), name="one of several", backend="none")
    return dict(models.load(folder, group, **options).named_parameters())


def assert_same_weights(folders, original, size, **options):
    """Every rank of `size` holds the same parameters, whichever of the folders they come from."""
    for rank in range(size):
        expected = weights(original, rank, size, **options)
        for folder in folders:
            actual = weights(folder, rank, size, **options)
            assert actual.keys() == expected.keys()
            for name, tensor in expected.items():
                assert actual[name].dtype == tensor.dtype
                assert torch.equal(actual[name], tensor), f"{name} of rank {rank} of {size}, from {folder.name}"


def chain(original, folder, cuts):
    """Reshard from one cut to the next, each from the one before; the folders in order."""
    folders = []
    for number, tp in enumerate(cuts):
        reshard(folders[-1] if folders else original, folder / f"{number}-tp{tp}", tp=tp)
        folders.append(folder / f"{number}-tp{tp}")
    return folders


def assert_same_files(export, original):
    """The same tensors, bit for bit, whatever the files they are spread over, and the same config."""
    actual, expected = (
        {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for folder in (export, original)
    )
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (export, original)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_loads_on_any_ranks(family, tiny, tmp_path):
    folders = chain(tiny[family], tmp_path, (1, 2, 3, 1))
    for size in (1, 3):
        assert_same_weights(folders, tiny[family], size)
    reshard(folders[-1], tmp_path / "hf", tp=1, format="hf")
    assert_same_files(tmp_path / "hf", tiny[family])


def run_forward(world, folder):
    ids, mask = (tensor.to(world.device) for tensor in batch())
    output = models.load(folder, world.tp)(input_ids=ids, attention_mask=mask)
    return (output.logits if "logits" in output else output.last_hidden_state).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_the_same(family, tiny, tmp_path, world):
    ids, mask = batch()
    with torch.inference_mode():
        kind = AutoModel if family == "bert" else AutoModelForCausalLM
        output = kind.from_pretrained(tiny[family])(input_ids=ids, attention_mask=mask)
    expected = output.logits if "logits" in output else output.last_hidden_state
    for tp, ranks in ((3, 2), (2, 3)):
        reshard(tiny[family], tmp_path / str(tp), tp=tp)
        for actual in world(ranks)(run_forward, tmp_path / str(tp)):
            assert_equal(actual[mask.bool()], expected[mask.bool()])


def test_another_dtype(tiny, tmp_path):
    """kv head 1 is on both ranks: its copies are compared in their own dtype, then converted."""
    reshard(tiny["llama"], tmp_path / "two", tp=2)
    assert_same_weights([tmp_path / "two"], tiny["llama"], 3, dtype=torch.bfloat16)


def test_replicas_that_differ_are_refused(tiny, tmp_path):
    reshard(tiny["llama"], tmp_path / "two", tp=2)
    file = tmp_path / "two" / "rank-00001-of-00002.safetensors"
    tensors, name = load_file(file), "layers.1.attention.qkv_weight"
    tensors[name][4 * 8] += 1  # 4 query heads of 8 rows, then the k of kv head 1
    with_header = {"tensors": tensors, "filename": file, "metadata": _header(file)}
    save_file(**with_header)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.qkv_weight .*ranks disagree about heads 1 to 1 of k"):
        models.load(tmp_path / "two")


def _header(file):
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def test_another_config_is_refused(tiny, tmp_path):
    reshard(tiny["llama"], tmp_path / "two", tp=2)
    path = tmp_path / "two" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 9, "head_dim": 4}))
    with pytest.raises(ValueError, match=r"kv_heads is 3 in .*two, 9 in its config\.json"):
        models.load(tmp_path / "two")


def test_quantised_checkpoints_are_refused(tiny, tmp_path):
    reshard(tiny["bert"], tmp_path / "int8", tp=2, quantize=True, group_size=1)
    with pytest.raises(ValueError, match=r"is quantised \(int8: it has layers\.0\..*_scale\).*load_rank reads int8"):
        models.load(tmp_path / "int8")


def test_check_needs_hugging_faces_files(tiny, tmp_path):
    reshard(tiny["llama"], tmp_path / "two", tp=2)
    (tmp_path / "two" / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(app, ["generate", "--model", str(tmp_path / "two"), "--prompt", "a", "--check"])
    assert isinstance(result.exception, ValueError)
    assert "does not read the files in" in str(result.exception)


def run_embeddings(world, folder):
    model = models.load(folder, world.tp)
    return embed(model, folder, tokenize(AutoTokenizer.from_pretrained(folder), TEXTS, 512)).cpu()


@pytest.mark.slow
def test_minilm_embeds_the_same_at_every_cut(minilm, tmp_path, world):
    (expected,) = world(1)(run_embeddings, minilm)
    folders = chain(minilm, tmp_path, (1, 2, 3, 12, 1))
    assert_same_weights(folders, minilm, 1)
    for folder in folders:
        assert torch.equal(world(1)(run_embeddings, folder)[0], expected)
    for actual in world(12, timeout=170)(run_embeddings, folders[3]):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # the sums of 12 ranks round in another order
    reshard(folders[-1], tmp_path / "hf", tp=1, format="hf")
    assert_same_files(tmp_path / "hf", minilm)


def run_text(world, folder, ids):
    model = models.load(folder, world.tp)
    return [token for token, _ in models.stream(model, ids, max_new_tokens=32)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_writes_the_same_text_at_every_cut(smollm2, tmp_path, world):
    """Each cut on as many ranks as it was made for; 9 query heads and 3 kv heads, so 2 and 9 ranks share kv heads."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(PROMPT)["input_ids"]])
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(smollm2)
        reference.generation_config.eos_token_id = None
        expected = reference.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
    del reference
    cuts = (1, 2, 3, 9, 1)
    folders = chain(smollm2, tmp_path, cuts)
    assert_same_weights(folders, smollm2, 1)
    for ranks, folder in zip(cuts, folders, strict=True):
        for tokens in world(ranks, timeout=170)(run_text, folder, ids):
            assert tokens == expected, f"cut for {ranks}"
    reshard(folders[-1], tmp_path / "hf", tp=1, format="hf")
    assert_same_files(tmp_path / "hf", smollm2)


@pytest.mark.slow
def test_generate_reads_our_own_folders(smollm2, tmp_path):
    reshard(smollm2, tmp_path / "three", tp=3)
    arguments = ["generate", "--prompt", PROMPT, "--max-new-tokens", "8", "--quiet", "--model"]
    ours, theirs = (CliRunner().invoke(app, [*arguments, str(folder)]) for folder in (tmp_path / "three", smollm2))
    assert ours.exit_code == theirs.exit_code == 0
    assert ours.stdout == theirs.stdout != ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_while_loading_our_own_files(smollm2, tmp_path, world):
    """As from Hugging Face's: 1.3 times the rank's share and one whole tensor, the largest."""
    reshard(smollm2, tmp_path / "three", tp=3)
    for peak, after, share in world(2)(run_load_under_watch, tmp_path / "three"):
        assert share * 0.9 < after, "the watch does not see the weights"
        assert peak <= 1.3 * share + 49152 * 576 * 4, f"peak {peak:,} for a share of {share:,}"
