"""DeepSpeed's MegatronSDLoader splits and merges Megatron's versions 0, 1.0 and 2.0: ours agrees with it bit for bit.

Its merge treats version 1.0 like 2.0, which is right for both: a rank's heads lie together in either.
"""

import os

import pytest
import tiny_llama
import tiny_megatron
import torch

from tp_attention.checkpoint import reshard


@pytest.fixture(scope="module")
def factory():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed warns that it finds no other
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.state_dict_factory import SDLoaderFactory

    return SDLoaderFactory


def rank_files(folder, tp):
    """A Megatron checkpoint's files."""
    return [str(folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt") for rank in range(tp)]


@pytest.mark.parametrize("version", [None, 1.0, 2.0])
@pytest.mark.parametrize(("before", "after"), [(1, 8), (2, 4), (8, 4), (4, 1)])
def test_split_and_merge(tmp_path, factory, version, before, after):
    # says=False: their loader would copy the arguments of the cut before, and heads are --heads here.
    tiny_megatron.write(tmp_path / "in", before, version, says=False, flat=True)
    reshard(tmp_path / "in", tmp_path / "out", after, format="megatron", heads=8)
    theirs = factory.get_sd_loader(rank_files(tmp_path / "in", before), None)
    for rank, file in enumerate(rank_files(tmp_path / "out" / "iter_0000007", after)):
        _, expected, _ = theirs.load(after, rank)
        ours = torch.load(file, weights_only=False)
        assert ours.get("checkpoint_version") == version
        assert tiny_llama.bits(ours["model"]) == tiny_llama.bits(expected["model"])


@pytest.mark.parametrize("version", [None, 2.0])
def test_deepspeed_reads_what_ours_wrote(tmp_path, factory, monkeypatch, version):
    tiny_megatron.write(tmp_path / "in", 2, version, flat=True)
    reshard(tmp_path / "in", tmp_path / "out", 4, format="deepspeed")
    reshard(tmp_path / "in", tmp_path / "expected", 2, format="megatron")
    monkeypatch.chdir(tmp_path / "out")  # it looks for the files of type Megatron from where it runs
    loader = factory.get_sd_loader_json("ds_inference_config.json", None)
    for rank, file in enumerate(rank_files(tmp_path / "expected" / "iter_0000007", 2)):
        _, merged, _ = loader.load(2, rank)
        assert tiny_llama.bits(merged["model"]) == tiny_llama.bits(torch.load(file, weights_only=False)["model"])
