#!/usr/bin/env python3
"""Makes tiny models with random weights, for real engines: run by the Python of tests/engines.py.

    make_models.py gguf FILE.gguf         llama, 2 layers, one token for each byte
    make_models.py mlx FOLDER             the same size as an MLX folder: config, tokenizer, weights
    make_models.py safetensors FOLDER     as mlx, said to be PyTorch's: for vLLM, and for conversions

They always answer, in lower-case letters, up to the token limit, and load in a second: the rows of
the output layer are zero but for the letters', so that no other token, nor the end, has a chance.
"""
import json
import os
import sys

import numpy

# Heads of 32: vLLM on a CPU has no attention for smaller ones.
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, CONTEXT = 2, 64, 256, 2, 1, 512
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = ("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RANDOM = numpy.random.default_rng(9)


def weights(rows, columns):
    return (RANDOM.standard_normal((rows, columns)) * 0.05).astype(numpy.float16)


def output_weights(vocabulary, spoken):
    """Logits of the spoken tokens are some 8 apart, all others are 0."""
    found = numpy.zeros((vocabulary, HIDDEN), dtype=numpy.float16)
    found[spoken] = RANDOM.standard_normal((len(spoken), HIDDEN)).astype(numpy.float16)
    return found


def layer_tensors():
    """(llama.cpp's name, Hugging Face's name, array or None for a norm) of one layer."""
    key = HIDDEN // HEADS * KV_HEADS
    return (("attn_norm", "input_layernorm", None),
            ("attn_q", "self_attn.q_proj", weights(HIDDEN, HIDDEN)),
            ("attn_k", "self_attn.k_proj", weights(key, HIDDEN)),
            ("attn_v", "self_attn.v_proj", weights(key, HIDDEN)),
            ("attn_output", "self_attn.o_proj", weights(HIDDEN, HIDDEN)),
            ("ffn_norm", "post_attention_layernorm", None),
            ("ffn_gate", "mlp.gate_proj", weights(INNER, HIDDEN)),
            ("ffn_up", "mlp.up_proj", weights(INNER, HIDDEN)),
            ("ffn_down", "mlp.down_proj", weights(HIDDEN, INNER)))


def make_gguf(path):
    from gguf import GGUFWriter, TokenType
    tokens = SPECIAL + ["<0x%02X>" % byte for byte in range(256)]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "Tiny Base")
    writer.add_base_model_organization(0, "Nobody")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(1)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    ones = numpy.ones(HIDDEN, dtype=numpy.float32)
    writer.add_tensor("token_embd.weight", weights(len(tokens), HIDDEN))
    for layer in range(LAYERS):
        for name, _, array in layer_tensors():
            writer.add_tensor("blk.%d.%s.weight" % (layer, name), ones if array is None else array)
    writer.add_tensor("output_norm.weight", ones)
    spoken = [len(SPECIAL) + ord(letter) for letter in LETTERS]
    writer.add_tensor("output.weight", output_weights(len(tokens), spoken))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_tokenizer(folder):
    """A byte-level BPE of some 300 tokens.  Returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write_json(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "model_max_length": CONTEXT, "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False})
    return tokenizer


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w") as handle:
        json.dump(value, handle, indent=2)


def make_folder(folder, form):
    from safetensors.numpy import save_file
    os.makedirs(folder, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    vocabulary = tokenizer.get_vocab_size()
    write_json(folder, "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "intermediate_size": INNER, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "vocab_size": vocabulary,
        "rope_theta": 10000.0, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16"})
    write_json(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    with open(os.path.join(folder, "README.md"), "w") as handle:
        handle.write("---\nlicense: apache-2.0\nbase_model: nobody/tiny-base\n---\n# tiny\n")
    ones = numpy.ones(HIDDEN, dtype=numpy.float16)
    tensors = {"model.embed_tokens.weight": weights(vocabulary, HIDDEN), "model.norm.weight": ones}
    for layer in range(LAYERS):
        for _, name, array in layer_tensors():
            tensors["model.layers.%d.%s.weight" % (layer, name)] = ones if array is None else array
    spoken = [tokenizer.token_to_id(letter) for letter in LETTERS]
    tensors["lm_head.weight"] = output_weights(vocabulary, spoken)
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": form})


if __name__ == "__main__":
    if sys.argv[1] == "gguf":
        make_gguf(sys.argv[2])
    else:
        make_folder(sys.argv[2], {"mlx": "mlx", "safetensors": "pt"}[sys.argv[1]])
