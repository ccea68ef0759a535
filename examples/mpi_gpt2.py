"""A GPT-2 with its attention cut over mpirun's ranks, which talk through MPI alone, writes the tokens of the whole one.

mpirun -n 2 python examples/mpi_gpt2.py  # OpenMPI wants --allow-run-as-root of root, --oversubscribe of one core
python examples/mpi_gpt2.py  # the same on one rank
"""

import copy
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tp_attention.comm import MPIGroup
from tp_attention.deepspeed_policy import replace_attention

SIZES = {"n_embd": 80, "n_head": 5, "n_layer": 3, "vocab_size": 1000, "bos_token_id": None, "eos_token_id": None}

with MPIGroup.world() as group, torch.inference_mode():
    torch.manual_seed(0)  # random weights, the same on every rank; a real program has from_pretrained here
    whole = GPT2LMHeadModel(GPT2Config(**SIZES, initializer_range=0.3)).eval()
    model = replace_attention(copy.deepcopy(whole), group)

    prompt = torch.tensor([[11, 42, 7, 99]])
    expected, actual = (
        each.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
        for each in (whole, model)
    )
    if group.rank == 0:
        print("tokens:", *actual)
        print("equal" if actual == expected else f"NOT EQUAL to {expected}", f"ranks {group.size}", sep=": ")

sys.exit(actual != expected)
