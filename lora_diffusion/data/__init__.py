"""Folder -> examples -> aspect buckets -> cached latents and text embeddings.

    records.py    captions in JSON
    examples.py   pictures with their captions, masks, repeats and weights, from the spellings people use
    pictures.py   opening them safely: orientation, alpha, size limits before decoding, damage
    captions.py   trigger word, tag shuffle, dropout: a fixed number of variants by seed
    buckets.py    which size a picture is trained at, how it is cut, and what SDXL wants to know about that
    prepare.py    the three above in one pass that lists every fault before anything starts
    cache.py      tensors on disk under the hash of everything they depend on

Import from these files; nothing is loaded here. Only `cache.py` needs torch.
"""
