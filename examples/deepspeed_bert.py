"""A BERT with TritonSelfAttention in every layer, its 12 heads cut over the ranks, against the same model whole.

DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/deepspeed_bert.py  # on GPUs: deepspeed --num_gpus 2 …
python examples/deepspeed_bert.py  # the same on one rank
"""

import copy
import sys

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from tp_attention import launch, models
from tp_attention.deepspeed_policy import replace_attention

SENTENCES = ["A cat sits on the mat.", "A kitten has settled on the rug.", "Shares fell."]
LIMIT = 1e-5  # of unit vectors, in fp32

disable_progress_bar()
with launch.init() as world, torch.inference_mode():
    folder = models.resolve("minilm")  # or the path of any BERT, GPT-2, GPT-NeoX, BLOOM, OPT or Llama folder
    whole = AutoModel.from_pretrained(folder).to(world.device).eval()
    model = replace_attention(copy.deepcopy(whole), world.tp)  # init_inference has DeepSpeed cut the MLP too

    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt").to(world.device)
    keep = batch["attention_mask"][..., None]
    sums = [(each(**batch).last_hidden_state * keep).sum(1) for each in (whole, model)]
    expected, actual = (torch.nn.functional.normalize(embedding, dim=-1) for embedding in sums)

    difference = (actual - expected).abs().max().item()
    if world.rank == 0:
        for sentence, likeness in zip(SENTENCES[1:], (actual[1:] @ actual[0]).tolist(), strict=True):
            print(f"{likeness:.2f} alike: {SENTENCES[0]} {sentence}")
        verdict = "equal" if difference <= LIMIT else "NOT EQUAL"
        print(f"{verdict}: ranks {world.size}, greatest difference {difference:.1e} (limit {LIMIT})")

sys.exit(difference > LIMIT)
