"""All-reduce over memory that the GPUs of one host share: kernels.py how, inbox.py their launches, offer.py whether."""
