"""Model files: what GGUF and safetensors headers say, what breaks them, and what fits.

Files are written by the formats' own packages (gguf, safetensors), or here, byte for byte, where
those would refuse to; published figures of llama.cpp and others stand as literals."""
import json
import os
import resource
import struct
import threading
import time
import tracemalloc

import pytest

import b9agent
from b9agent import KvLayers, ModelFacts, UsageError, estimate_fit, kv_cache_bytes, read_model

MIB, GIB = 1 << 20, 1 << 30
U8, U32, I32, F32, BOOL, TEXT, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10


# -- a writer of our own, which writes what no other would -------------

def text(value, order="<"):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack(order + "Q", len(raw)) + raw


def value_bytes(value, order="<"):
    """(type, bytes): an int is u32, a str a text, a list of ints an array of i32, bytes as given
    after their type."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, bool):
        return BOOL, struct.pack(order + "B", value)
    if isinstance(value, int):
        return U32, struct.pack(order + "I", value)
    if isinstance(value, str):
        return TEXT, text(value, order)
    items = [value_bytes(item, order) for item in value]
    kind = items[0][0] if items else U32
    return ARRAY, (struct.pack(order + "IQ", kind, len(items))
                   + b"".join(raw for _, raw in items))


def gguf_bytes(fields=(), tensors=(), version=3, order="<", weights=None, counts=None):
    """tensors: (name, shape, type number, offset).  counts: (tensors, fields) to claim instead."""
    fields = list(fields.items()) if isinstance(fields, dict) else list(fields)
    count_tensors, count_fields = counts or (len(tensors), len(fields))
    out = b"GGUF" + struct.pack(order + "IQQ", version, count_tensors, count_fields)
    for key, value in fields:
        kind, raw = value_bytes(value, order)
        out += text(key, order) + struct.pack(order + "I", kind) + raw
    for name, shape, kind, offset in tensors:
        out += text(name, order) + struct.pack(order + "I", len(shape))
        out += b"".join(struct.pack(order + "Q", axis) for axis in shape)
        out += struct.pack(order + "IQ", kind, offset)
    out += bytes(-len(out) % 32)
    return out + (b"\0" * 4096 if weights is None else weights)


SMALL = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
         "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
         "llama.context_length": 512}
ONE = [("output.weight", (32, 8), 0, 0)]


def write(path, raw):
    path.write_bytes(raw)
    return str(path)


def small(folder, fields=None, tensors=ONE, **options):
    return write(folder / "m.gguf", gguf_bytes(dict(SMALL, **(fields or {})), tensors, **options))


def facts_of(folder, architecture, **fields):
    """Facts of a GGUF with these fields of its architecture; dots are two underscores."""
    named = {"%s.%s" % (architecture, key.replace("__", ".")): value
             for key, value in fields.items()}
    return read_model(write(folder / "m.gguf", gguf_bytes(
        dict({"general.architecture": architecture}, **named), ONE)))


def tensors_bytes(entries, metadata=None, weights=None, header=None):
    """A safetensors file of {name: (dtype, shape, begin, end)}."""
    found = {} if metadata is None else {"__metadata__": metadata}
    found.update({name: {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
                  for name, (kind, shape, begin, end) in entries.items()})
    raw = json.dumps(found).encode() if header is None else header
    size = max([end for _, _, _, end in entries.values()] or [0])
    return struct.pack("<Q", len(raw)) + raw + (bytes(size) if weights is None else weights)


def hf(folder, config, entries=None, name="model.safetensors", metadata=None):
    entries = entries or {"w": ("BF16", [4, 8], 0, 64)}
    (folder / name).write_bytes(tensors_bytes(entries, metadata))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return read_model(str(folder))


LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}}


# -- files of the formats' own packages ---------------------------------

@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


def oracle_gguf(gguf, path, order=None, split=0):
    import numpy
    options = {"endianess": order} if order is not None else {}
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=split, **options)
    writer.add_name("Tiny Llama")
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "Tiny Base")
    writer.add_base_model_repo_url(0, "https://huggingface.co/acme/tiny-base")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(7)
    writer.add_token_list(["<%d>" % number for number in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_token_types([1] * 5000)
    writer.add_chat_template("{{ messages }}" * 1000)
    writer.add_tensor("token_embd.weight", numpy.zeros((100, 64), dtype=numpy.float16))
    writer.add_tensor("output_norm.weight", numpy.zeros(64, dtype=numpy.float32))
    packed = numpy.zeros((100, 68), dtype=numpy.uint8)  # 64 values are 2 blocks of 34 bytes
    if order is None:
        writer.add_tensor("output.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_of_the_gguf_package(tmp_path, gguf):
    path = tmp_path / "tiny-Q8_0.gguf"
    oracle_gguf(gguf, path)
    assert read_model(str(path)) == ModelFacts(
        name="Tiny Llama", path=str(path), format="gguf", architecture="llama",
        parameters=6400 + 64 + 6400, quantization="Q8_0", weights_bytes=12800 + 256 + 6800,
        layers=2, heads=4, kv_heads=2, head_dim=16, context_tokens=2048, license="apache-2.0",
        base_model="acme/tiny-base", files=(str(path),), kv=(KvLayers(2, 64),))


def test_a_gguf_of_version_2_and_one_for_big_endian_machines_read_the_same(tmp_path, gguf):
    oracle_gguf(gguf, tmp_path / "little.gguf")
    raw = bytearray((tmp_path / "little.gguf").read_bytes())
    raw[4] = 2
    (tmp_path / "two.gguf").write_bytes(raw)
    little, two = (read_model(str(tmp_path / name)) for name in ("little.gguf", "two.gguf"))
    assert two._replace(path="", files=()) == little._replace(path="", files=())
    oracle_gguf(gguf, tmp_path / "big.gguf", gguf.GGUFEndian.BIG)
    big = read_model(str(tmp_path / "big.gguf"))
    assert (big.name, big.layers, big.context_tokens, big.parameters, big.weights_bytes) == (
        "Tiny Llama", 2, 2048, 6464, 13056)


def test_a_model_in_parts_is_read_whole_from_any_of_them(tmp_path, gguf):
    oracle_gguf(gguf, tmp_path / "tiny.gguf", split=1)
    parts = sorted(str(tmp_path / name) for name in os.listdir(str(tmp_path)))
    assert len(parts) == 3 and parts[2].endswith("tiny-00003-of-00003.gguf")
    for path in (parts[0], parts[2], str(tmp_path)):
        found = read_model(path)
        assert (found.parameters, found.weights_bytes, found.name, found.files) == (
            12864, 19856, "Tiny Llama", tuple(parts))
    os.unlink(parts[1])
    with pytest.raises(UsageError, match="00002-of-00003.*No such file.*Check that it is there"):
        read_model(parts[0])


def test_every_type_of_the_gguf_package_has_its_name_and_size(gguf):
    assert b9agent._GGML_TYPES == {
        int(kind): (kind.name,) + gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGMLQuantizationType}


def test_every_file_type_of_the_gguf_package_has_its_name(gguf):
    known = {int(kind): kind.name.split("_", 1)[1] for kind in gguf.LlamaFileType
             if kind.name != "GUESSED"}
    known[38] = "MXFP4"
    assert {number: name for number, name in enumerate(b9agent._GGUF_FILE_TYPES)
            if name != "?"} == known


def test_a_safetensors_folder_of_the_safetensors_package(tmp_path):
    numpy = pytest.importorskip("numpy")
    pack = pytest.importorskip("safetensors.numpy")
    tensors = {"model.embed.weight": numpy.zeros((100, 64), dtype=numpy.float16),
               "model.norm.weight": numpy.zeros(64, dtype=numpy.float32),
               "model.flag": numpy.zeros(3, dtype=bool)}
    pack.save_file(tensors, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    (tmp_path / "README.md").write_text(
        "---\nlanguage:\n- en\nlicense: llama3.1\nbase_model:\n- meta/Base-8B\n- other\n---\n# Hi")
    assert read_model(str(tmp_path)) == ModelFacts(
        name=os.path.basename(str(tmp_path)), path=str(tmp_path), format="safetensors",
        architecture="LlamaForCausalLM", parameters=6467, quantization="F16",
        weights_bytes=12800 + 256 + 3, layers=32, heads=32, kv_heads=8, head_dim=128,
        context_tokens=131072, license="llama3.1", base_model="meta/Base-8B",
        files=(str(tmp_path / "model.safetensors"),), kv=(KvLayers(32, 2048),))


def test_a_sharded_safetensors_folder_is_read_by_its_index(tmp_path):
    pack = pytest.importorskip("safetensors.numpy")
    numpy = pytest.importorskip("numpy")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        pack.save_file({"w%d" % number: numpy.zeros((8, 8), dtype=numpy.float32)},
                       str(tmp_path / name))
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy of the weights")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 512}, "weight_map": {"w0": names[0], "w1": names[1]}}))
    found = read_model(str(tmp_path))
    assert (found.parameters, found.weights_bytes, len(found.files)) == (128, 512, 2)
    assert (found.layers, found.kv, found.license) == (None, None, None)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "consolidated.safetensors").unlink()
    assert read_model(str(tmp_path)).files == found.files
    assert read_model(str(tmp_path / names[1])).files == found.files


def test_an_index_leads_nowhere_else(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside.safetensors").write_bytes(tensors_bytes({"w": ("F32", [2], 0, 8)}))
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    with pytest.raises(UsageError, match="inner/outside.safetensors: No such file"):
        read_model(str(tmp_path / "inner"))


# -- published figures ---------------------------------------------------

def llama_31_8b_q4_k_m(path):
    """The file of Llama 3.1 8B as llama.cpp quantises it: 66 tensors in F32, 193 in Q4_K, 33 in
    Q6_K (its log).  Sparse: 4.6 GiB that take no place."""
    q4, q6 = 12, 14
    rich = [layer for layer in range(32) if layer < 4 or layer >= 28 or (layer - 4) % 3 == 2]
    shapes = [("token_embd.weight", (4096, 128256), q4), ("output_norm.weight", (4096,), 0),
              ("output.weight", (4096, 128256), q6), ("rope_freqs.weight", (64,), 0)]
    for layer in range(32):
        high = q6 if layer in rich else q4
        shapes += [("blk.%d.%s.weight" % (layer, name), shape, kind) for name, shape, kind in (
            ("attn_norm", (4096,), 0), ("ffn_norm", (4096,), 0), ("attn_q", (4096, 4096), q4),
            ("attn_k", (4096, 1024), q4), ("attn_v", (4096, 1024), high),
            ("attn_output", (4096, 4096), q4), ("ffn_gate", (4096, 14336), q4),
            ("ffn_up", (4096, 14336), q4), ("ffn_down", (14336, 4096), high))]
    assert [sum(one == kind for _, _, kind in shapes for one in [kind] if one == wanted)
            for wanted in (0, q4, q6)] == [66, 193, 33]
    tensors, offset = [], 0
    for name, shape, kind in shapes:
        elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        tensors.append((name, shape, kind, offset))
        offset += {0: elements * 4, q4: elements // 256 * 144, q6: elements // 256 * 210}[kind]
    raw = gguf_bytes({
        "general.architecture": "llama", "general.name": "Meta Llama 3.1 8B Instruct",
        "general.license": "llama3.1", "general.file_type": 15, "llama.block_count": 32,
        "llama.context_length": 131072, "llama.embedding_length": 4096,
        "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8}, tensors, weights=b"")
    with open(str(path), "wb") as handle:
        handle.write(raw)
        handle.truncate(len(raw) + offset)
    return read_model(str(path))


def test_llama_31_8b_q4_k_m_is_as_long_as_llama_cpp_says(tmp_path):
    """llama.cpp: "model size = 4.58 GiB (4.89 BPW)", "model params = 8.03 B"; buffers of 281.81 MiB
    (CPU) and 4403.49 MiB (GPU); "KV self size = 1024.00 MiB" for 8192 tokens."""
    facts = llama_31_8b_q4_k_m(tmp_path / "m.gguf")
    assert "%.2f" % (facts.parameters / 1e9) == "8.03" and facts.quantization == "Q4_K_M"
    assert "%.2f" % (facts.weights_bytes / GIB) == "4.58"
    assert "%.2f" % (facts.weights_bytes * 8 / facts.parameters) == "4.89"
    assert "%.2f" % (facts.weights_bytes / MIB) == "%.2f" % (281.81 + 4403.49)
    assert kv_cache_bytes(facts, 8192) == 1024 * MIB
    assert kv_cache_bytes(facts, 131072) == 16384 * MIB


def test_llama_31_8b_takes_128_kib_a_token_in_f16(tmp_path):
    """Meta's table of Llama 3.1 (Hugging Face's blog): 15.62 GiB for 128,000 tokens; 70B 39.06."""
    facts = hf(tmp_path, LLAMA_31_8B)
    assert kv_cache_bytes(facts, 256) == 256 * 128 * 1024
    assert "%.3f" % (kv_cache_bytes(facts, 128000) / GIB) == "15.625"
    large = hf(tmp_path, dict(LLAMA_31_8B, hidden_size=8192, num_hidden_layers=80,
                              num_attention_heads=64))
    assert "%.2f" % (kv_cache_bytes(large, 128000) / GIB) == "39.06"


def test_a_qwen_whose_cache_llama_cpp_logs_as_144_mib(tmp_path):
    """"n_embd_k_gqa = 256, n_embd_v_gqa = 256", 36 layers, 4096 tokens: "KV self size = 144.00
    MiB, K (f16): 72.00 MiB, V (f16): 72.00 MiB" (SciSharp/LLamaSharp, issue 1099)."""
    facts = facts_of(tmp_path, "qwen2", block_count=36, embedding_length=2048,
                     attention__head_count=16, attention__head_count_kv=2, context_length=32768)
    assert kv_cache_bytes(facts, 4096) == 144 * MIB


def test_a_head_dimension_of_its_own_counts(tmp_path):
    """Qwen3 0.6B: 4.38 GiB for 40,960 tokens (unslothai/unsloth, pull request 4757)."""
    facts = hf(tmp_path, {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
                          "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128})
    assert "%.2f" % (kv_cache_bytes(facts, 40960) / GIB) == "4.38"


DEEPSEEK = {"block_count": 61, "embedding_length": 7168, "attention__head_count": 128,
            "attention__head_count_kv": 1, "attention__kv_lora_rank": 512,
            "attention__key_length": 576, "attention__value_length": 512,
            "rope__dimension_count": 64, "context_length": 163840}


def test_latent_attention_of_deepseek(tmp_path):
    """ik_llama.cpp, 32,768 tokens: "KV self size = 1166.62 MiB, c^KV (q8_0)" (pull request 259);
    DeepSeek V3.1 in f16: 10.72 GiB for 163,840 tokens (unslothai/unsloth, pull request 4757)."""
    facts = facts_of(tmp_path, "deepseek2", attention__key_length_mla=192,
                     attention__value_length_mla=128, **DEEPSEEK)
    assert facts.kv == (KvLayers(61, 576),)
    assert "%.2f" % (kv_cache_bytes(facts, 32768, bytes_per_value=34 / 32) / MIB) == "1166.62"
    assert "%.2f" % (kv_cache_bytes(facts, 163840) / GIB) == "10.72"
    config = {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
              "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
              "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
              "max_position_embeddings": 163840}
    assert hf(tmp_path, config).kv == facts.kv


def test_a_deepseek_converted_before_mla_caches_whole_heads(tmp_path):
    """llama.cpp logs "n_embd_k_gqa = 24576, n_embd_v_gqa = 16384" for it (pull request 11397)."""
    fields = dict(DEEPSEEK, attention__head_count_kv=128, attention__key_length=192,
                  attention__value_length=128)
    assert facts_of(tmp_path, "deepseek2", **fields).kv == (KvLayers(61, 24576 + 16384),)


def gemma_270m(folder):
    return facts_of(folder, "gemma3", block_count=18, embedding_length=640,
                    attention__head_count=4, attention__head_count_kv=1,
                    attention__key_length=256, attention__value_length=256,
                    attention__sliding_window=512, context_length=32768)


@pytest.mark.parametrize("parallel, tokens, mib", [
    (1, 4096, 27), (2, 2048, 42), (4, 1024, 72), (8, 512, 72), (1, 8192, 39), (2, 4096, 54)])
def test_sliding_windows_of_gemma_as_measured_with_llama_server(tmp_path, parallel, tokens, mib):
    """unslothai/unsloth, pull request 5225; there `ctx` is of all sequences together."""
    assert kv_cache_bytes(gemma_270m(tmp_path), tokens, parallel) == mib * MIB


REAL = {  # small models as run, and the sum of "llama_kv_cache: size =" for tokens, sequences
    "llama": (dict(block_count=6, embedding_length=256, attention__head_count=8,
                   attention__head_count_kv=2), {(4096, 1): 6.0, (2000, 2): 6.0}),
    "gemma3": (dict(block_count=26, embedding_length=256, attention__head_count=4,
                    attention__head_count_kv=1, attention__key_length=64,
                    attention__value_length=64, attention__sliding_window=512),
               {(4096, 1): 4.0 + 5.5, (2048, 2): 4.0 + 11.0, (700, 1): 0.75 + 4.125}),
    "deepseek2": (dict(block_count=4, embedding_length=256, attention__head_count=4,
                       attention__head_count_kv=1, attention__key_length=160,
                       attention__value_length=128, attention__key_length_mla=64,
                       attention__value_length_mla=32, attention__kv_lora_rank=128,
                       rope__dimension_count=32), {(4096, 1): 5.0})}


@pytest.mark.parametrize("architecture", sorted(REAL))
def test_caches_are_as_large_as_a_real_llama_server_made_them(tmp_path, architecture):
    """Read off the log of Debian's llama.cpp of November 2026, run with -c tokens × sequences."""
    fields, sizes = REAL[architecture]
    facts = facts_of(tmp_path, architecture, **fields)
    assert {key: kv_cache_bytes(facts, *key) / MIB for key in sizes} == sizes


def test_gemma_3_27b_and_its_config_agree(tmp_path):
    """62 layers, every 6th sees all: 10 and 52.  10 GiB of 131,072 tokens are of those ten."""
    facts = facts_of(tmp_path, "gemma3", block_count=62, embedding_length=5376,
                     attention__head_count=32, attention__head_count_kv=16,
                     attention__key_length=128, attention__value_length=128,
                     attention__sliding_window=1024, context_length=131072)
    assert sorted(facts.kv) == [KvLayers(10, 4096), KvLayers(52, 4096, 1024)]
    assert kv_cache_bytes(facts, 131072) == 10 * GIB + 52 * 1536 * 8192
    text_config = {"model_type": "gemma3_text", "num_hidden_layers": 62, "hidden_size": 5376,
                   "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
                   "sliding_window": 1024, "sliding_window_pattern": 6}
    found = hf(tmp_path, {"model_type": "gemma3", "text_config": text_config,
                          "architectures": ["Gemma3ForConditionalGeneration"]})
    assert sorted(found.kv) == sorted(facts.kv) and found.layers == 62


def test_layers_that_share_a_cache_and_heads_of_two_sizes(tmp_path):
    """Gemma 4 E4B, 4096 tokens: 64.00 MiB for the layers that see all, 160.00 MiB for the others
    at full size (qualcomm/GenieX, pull request 1346)."""
    facts = facts_of(tmp_path, "gemma4", block_count=42, embedding_length=2560,
                     attention__head_count=8, attention__head_count_kv=2,
                     attention__key_length=512, attention__value_length=512,
                     attention__key_length_swa=256, attention__value_length_swa=256,
                     attention__sliding_window=512, attention__shared_kv_layers=18,
                     attention__sliding_window_pattern=[layer % 6 != 5 for layer in range(42)])
    assert sorted(facts.kv) == [KvLayers(4, 2048), KvLayers(20, 1024, 512)]
    assert [row.layers * row.values * 2 * 4096 // MIB for row in sorted(facts.kv)] == [64, 160]
    config = {"model_type": "gemma4_text", "num_hidden_layers": 42, "hidden_size": 2560,
              "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
              "global_head_dim": 512, "num_kv_shared_layers": 18, "sliding_window": 512,
              "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention"
                              for layer in range(42)]}
    assert sorted(hf(tmp_path, config).kv) == sorted(facts.kv)


def test_half_of_gpt_oss_sees_a_window(tmp_path):
    """3.00 GiB for 131,072 tokens in 12 of 24 layers (gpustack/gguf-parser-go, issue 32)."""
    facts = facts_of(tmp_path, "gpt-oss", block_count=24, embedding_length=2880,
                     attention__head_count=64, attention__head_count_kv=8,
                     attention__key_length=64, attention__value_length=64,
                     attention__sliding_window=128)
    whole, = [row for row in facts.kv if row.window is None]
    assert whole.layers * whole.values * 2 * 131072 == 3 * GIB
    assert [row.layers for row in facts.kv if row.window == 128] == [12]


def test_hybrids_keep_a_state_in_most_layers(tmp_path):
    """Qwen3.5 27B: 16.00 GiB for 262,144 tokens (unslothai/unsloth, pull request 4757)."""
    facts = facts_of(tmp_path, "qwen35", block_count=65, embedding_length=5120,
                     attention__head_count=24, attention__head_count_kv=4,
                     attention__key_length=256, attention__value_length=256,
                     nextn_predict_layers=1, ssm__state_size=128, ssm__inner_size=6144,
                     ssm__group_count=16, ssm__conv_kernel=4)
    assert facts.kv == (KvLayers(16, 2048),)
    state = 4 * 48 * (6144 * 128 + 3 * (6144 + 2 * 16 * 128))
    assert facts.state_bytes == state
    assert kv_cache_bytes(facts, 262144, parallel=2) == 2 * (16 * GIB + state)
    config = {"model_type": "qwen3_next", "num_hidden_layers": 64, "hidden_size": 5120,
              "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256,
              "linear_num_value_heads": 48, "linear_value_head_dim": 128,
              "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_conv_kernel_dim": 4}
    for kinds in (None, ["linear_attention"] * 3 + ["full_attention"]):
        found = hf(tmp_path, dict(config, layer_types=kinds and kinds * 16))
        assert (found.kv, found.state_bytes) == (facts.kv, state)


def test_a_mamba_has_no_cache_but_a_state_and_an_encoder_has_neither(tmp_path):
    mamba = facts_of(tmp_path, "mamba", block_count=4, embedding_length=64,
                     attention__head_count=0, ssm__state_size=16, ssm__inner_size=128,
                     ssm__conv_kernel=4)
    assert (mamba.kv, mamba.state_bytes) == ((), 4 * 4 * (128 * 16 + 3 * 128))
    bert = facts_of(tmp_path, "bert", block_count=4, embedding_length=64,
                    attention__head_count=4, attention__causal=False)
    assert (bert.kv, kv_cache_bytes(bert, 512)) == ((), 0)
    rwkv = facts_of(tmp_path, "rwkv7", block_count=4, embedding_length=64, attention__head_count=0)
    assert rwkv.kv is None and kv_cache_bytes(rwkv, 512) is None


def test_heads_may_differ_from_layer_to_layer(tmp_path):
    facts = facts_of(tmp_path, "deci", block_count=4, embedding_length=512,
                     attention__head_count=[8, 8, 0, 8], attention__head_count_kv=[4, 2, 0, 4])
    assert facts.kv == (KvLayers(2, 512), KvLayers(1, 256))
    assert (facts.heads, facts.kv_heads, facts.head_dim) == (8, 4, 64)


@pytest.mark.parametrize("fields", [
    {"attention__head_count": [4, 4, 4]},  # for 4 layers
    {"attention__head_count": "four"}, {"attention__head_count": [2, 1 << 30, 2, 2]},
    {"block_count": 0}, {"block_count": "4"}, {"block_count": 1 << 30}, {"embedding_length": 0}])
def test_a_shape_that_cannot_be_leaves_the_cache_unknown(tmp_path, fields):
    known = {"block_count": 4, "embedding_length": 64, "attention__head_count": 4}
    facts = facts_of(tmp_path, "llama", **dict(known, **fields))
    assert facts.kv is None and estimate_fit(facts, 80 * GIB).fits is None


# -- what config.json and README.md say -----------------------------------

@pytest.mark.parametrize("rope, tokens", [
    ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 40960),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 40960),
    ({"type": "yarn", "factor": float("nan"), "original_max_position_embeddings": 1}, 40960),
    ({"type": "yarn", "factor": 1e308, "original_max_position_embeddings": 32768}, 40960),
    ("yarn", 40960), (None, 40960)])
def test_rope_scaling_makes_the_context_longer_only_where_it_does(tmp_path, rope, tokens):
    config = dict(LLAMA_31_8B, max_position_embeddings=40960, rope_scaling=rope)
    assert hf(tmp_path, config).context_tokens == tokens


def test_a_window_that_is_switched_off_or_without_a_pattern_saves_nothing(tmp_path):
    for more in ({"sliding_window": 4096}, {"sliding_window": None},
                 {"sliding_window": 4096, "use_sliding_window": False,
                  "sliding_window_pattern": 2}):
        assert hf(tmp_path, dict(LLAMA_31_8B, **more)).kv == (KvLayers(32, 2048),)


@pytest.mark.parametrize("quantised, name", [
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ 4-bit"),
    ({"quant_method": "awq", "w_bit": 4}, "AWQ 4-bit"),
    ({"quant_method": "gptq", "bits": 8}, "GPTQ 8-bit"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
     "FP8"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
    ({"quant_method": "compressed-tensors",
      "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}},
     "compressed-tensors 8-bit")])
def test_quantisation_is_named(tmp_path, quantised, name):
    facts = hf(tmp_path, dict(LLAMA_31_8B, quantization_config=quantised),
               {"q.qweight": ("I32", [8, 8], 0, 256), "q.scales": ("F16", [8], 256, 272)})
    assert (facts.format, facts.quantization, facts.weights_bytes) == ("safetensors", name, 272)
    assert facts.parameters is None  # several in one integer


def test_mlx_weights_are_known_by_their_config_or_their_header(tmp_path):
    packed = {"w.weight": ("U32", [8, 8], 0, 256), "w.scales": ("BF16", [8], 256, 272)}
    facts = hf(tmp_path, dict(LLAMA_31_8B, quantization={"group_size": 64, "bits": 4}), packed)
    assert (facts.format, facts.quantization) == ("mlx", "MLX 4-bit")
    plain = hf(tmp_path, LLAMA_31_8B, metadata={"format": "mlx"})
    assert (plain.format, plain.quantization, plain.parameters) == ("mlx", "BF16", 32)
    assert hf(tmp_path, LLAMA_31_8B, metadata={"format": "pt"}).format == "safetensors"


def test_types_of_8_and_of_4_bits_are_weighed_as_they_are(tmp_path):
    facts = hf(tmp_path, None, {"a": ("F8_E4M3", [4, 4], 0, 16), "b": ("F4", [4, 4], 16, 24),
                                "c": ("NEW", [5], 24, 31)})
    assert (facts.weights_bytes, facts.quantization, facts.architecture) == (31, "F8_E4M3", None)


@pytest.mark.parametrize("front, license_name, base", [
    ("---\nlicense: mit\nbase_model: a/b\n---\n", "mit", "a/b"),
    ("---\r\nlicense: 'mit'  \r\nbase_model: [\"a/b\", c/d]\r\n---\r\n", "mit", "a/b"),
    ("---\nbase_model:\n  - a/b\nlicense: other\nlicense_name: own-license\n---\n",
     "own-license", "a/b"),
    ("---\nlicense: other\n---\n", "other", None), ("license: mit\n", None, None),
    ("---\nlicense:\n---\n", None, None), ("---\nlicense: mit", None, None), ("", None, None)])
def test_license_and_base_come_from_the_model_card(tmp_path, front, license_name, base):
    (tmp_path / "README.md").write_bytes(front.encode())
    facts = hf(tmp_path, LLAMA_31_8B)
    assert (facts.license, facts.base_model) == (license_name, base)


def test_a_model_card_of_nothing_but_spaces_takes_no_time(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense:" + " \n" * 30000 + " " * 30000 + "\n---")
    begin = time.process_time()
    assert hf(tmp_path, LLAMA_31_8B).license is None
    assert time.process_time() - begin < 5


def test_a_gguf_says_its_license_base_and_name_itself(tmp_path):
    path = small(tmp_path, {"general.license": "other", "general.license.name": "own\x1b[2J",
                            "general.base_model.0.name": "Base", "general.name": "  "})
    facts = read_model(path)
    assert (facts.license, facts.base_model, facts.name) == ("own\\x1b[2J", "Base", "m")
    assert facts.quantization == "F32"


def test_a_blob_of_ollama_and_a_folder_of_the_hub_have_names(tmp_path):
    blob = write(tmp_path / "sha256-5f3a", gguf_bytes(SMALL, ONE))
    assert (read_model(blob).format, read_model(blob).name) == ("gguf", "sha256-5f3a")
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "5f3a"
    snapshot.mkdir(parents=True)
    (tmp_path / "blob").write_bytes(tensors_bytes({"w": ("F32", [2], 0, 8)}))
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blob")
    assert read_model(str(snapshot)).name == "acme/tiny"


# -- files that are broken, or made to break ------------------------------

HUGE = struct.pack("<Q", 1 << 63)


@pytest.mark.parametrize("raw, said", [
    (b"", "no file, or an empty one"),
    (b"GGUF", "4 bytes should follow, there are 0"),
    (gguf_bytes(SMALL, ONE)[:100], "bytes should follow"),
    (gguf_bytes(SMALL, ONE, version=1), "GGUF version 1 "),
    (gguf_bytes(SMALL, ONE, version=99), "GGUF version 99 "),
    (gguf_bytes(SMALL, ONE, counts=(1 << 63, 6)), "with 9223372036854775808 tensors"),
    (gguf_bytes(SMALL, ONE, counts=(1, 1 << 63)), "9223372036854775808 fields"),
    (gguf_bytes([("k", (TEXT, HUGE))]), "9223372036854775808 bytes should follow"),
    (gguf_bytes([("k", (TEXT, b"\xff" * 8))]), "18446744073709551615 bytes should follow"),
    (gguf_bytes([("k" * 300, 1)]), "a name of more than 256"),
    (gguf_bytes([("k", (ARRAY, struct.pack("<I", U8) + HUGE))]), "bytes should follow"),
    (gguf_bytes([("k", (ARRAY, struct.pack("<I", TEXT) + HUGE))]), "bytes should follow"),
    (gguf_bytes([("k", [[1, 2], [3]])]), "a list within a list"),
    (gguf_bytes([("k", (13, b""))]), "a value of type 13"),
    (gguf_bytes([("k", 1), ("k", 2)]), "the field k twice"),
    (gguf_bytes({"general.alignment": 0}, ONE), "alignment"),
    (gguf_bytes(SMALL, [("a", (32, 8), 0, 0), ("a", (32, 8), 0, 1024)]), "comes twice"),
    (gguf_bytes(SMALL, [("a", (32, 8), 0, 0), ("b", (32, 8), 0, 512)]), "overlaps"),
    (gguf_bytes(SMALL, [("a", (32, 64), 0, 0)]), "8192 bytes of weights should follow"),
    (gguf_bytes(SMALL, [("a", (1 << 63, 1 << 63), 0, 0)]), "bytes of weights should follow"),
    (gguf_bytes(SMALL, [("a", (0, 4), 0, 0)]), "cannot be"),
    (gguf_bytes(SMALL, [("a", (33, 4), 2, 0)]), "cannot be"),
    (gguf_bytes(SMALL, [("a", (32, 4), 0, 7)]), "cannot be"),
    (gguf_bytes(SMALL, [("a", (2,) * 5, 0, 0)]), "of 5 dimensions"),
    (gguf_bytes(SMALL, []), "has no tensors"),
    (gguf_bytes(dict(SMALL, **{"split.count": 3}), ONE), "part of a model in 3 files"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Run: git lfs pull"),
    (b"PK\3\4" + bytes(40), "a PyTorch file, which can run code. Convert it"),
    (b"\x80\2ctorch" + bytes(40), "a PyTorch file"), (b"<!DOCTYPE html><html>", "a web page"),
    (b"anything else", "neither GGUF nor safetensors"), (b"x", "neither GGUF nor safetensors"),
    (b"\xff" * 8 + b"{}", "18446744073709551615 bytes of JSON"),
    (struct.pack("<Q", 1 << 20) + b"{}", "1048576 bytes should follow, there are 2"),
    (tensors_bytes({}, header=b"{" + b"x" * 30), "no JSON, or too much"),
    (tensors_bytes({}, header=b"{\"a\":" + b"[" * 100000), "no JSON, or too much"),
    (tensors_bytes({}, header=b"{\"a\":" + b"9" * 5000 + b"}"), "a without a type, shape"),
    (tensors_bytes({}, header=b"{\"a\":{},\"a\":{}}"), "a name that is there twice"),
    (tensors_bytes({}, header=b"{\"a\":[" + b"0," * 1100000 + b"0]}"), "no JSON, or too much"),
    (tensors_bytes({}, header=b"{}"), "has no tensors"),
    (tensors_bytes({"a": ("F32", [2], 0, 7)}), "not as long as its shape"),
    (tensors_bytes({"a": ("F32", [2], 8, 0)}, weights=bytes(8)), "not as long as its shape"),
    (tensors_bytes({"a": ("NEW", [2], 8, 0)}, weights=bytes(8)), "not as long as its shape"),
    (tensors_bytes({"a": ("F32", [-2], 0, 8)}), "without a type, shape and place"),
    (tensors_bytes({"a": ("F32", [True], 0, 4)}), "without a type, shape and place"),
    (tensors_bytes({"a": ("F32", [1 << 62], 0, 8)}), "without a type, shape and place"),
    (tensors_bytes({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)}), "overlaps"),
    (tensors_bytes({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 16, 24)}), "that belong to no"),
    (tensors_bytes({"a": ("F32", [2], 0, 8)}, weights=bytes(4)), "there are 4"),
    (tensors_bytes({"a": ("F32", [2], 0, 8)}, weights=bytes(9)), "belong to no tensor")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_file_is_named_with_the_place_and_what_mends_it(tmp_path, raw, said):
    path = write(tmp_path / "m", raw)
    with pytest.raises(UsageError) as caught:
        read_model(path)
    assert said in str(caught.value) and path in caught.value.what and caught.value.hint
    assert str(caught.value).isprintable()


def test_a_tensor_of_a_type_that_is_not_known_is_weighed_by_the_file(tmp_path):
    facts = read_model(small(tmp_path, tensors=[("a", (32, 8), 99, 0)]))
    assert (facts.weights_bytes, facts.quantization, facts.parameters) == (4096, "type 99", 256)


@pytest.mark.parametrize("name, raw, said", [
    ("config.json", b"{", "config.json, byte 1: no JSON"), ("config.json", b"[1,", "no JSON"),
    ("config.json", b"\xff\xfe", "no JSON"),
    ("config.json", b"", "config.json is no file"),
    ("model.safetensors.index.json", b"{\"weight_map\": 1,}", "index.json, byte")])
def test_a_broken_file_beside_the_weights_is_named(tmp_path, name, raw, said):
    (tmp_path / "model.safetensors").write_bytes(tensors_bytes({"w": ("F32", [2], 0, 8)}))
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError, match=said):
        read_model(str(tmp_path))


@pytest.mark.parametrize("config", [
    {"architectures": [], "model_type": 7}, {"architectures": [None]}, {"text_config": []},
    {"layer_types": [[]], "num_hidden_layers": 1}, {"model_type": [[[]]]}, {"num_hidden_layers": True},
    {"num_hidden_layers": 4096, "num_attention_heads": 1 << 40}, {"quantization_config": "awq"},
    {"num_hidden_layers": 1e308, "hidden_size": -1, "head_dim": {}, "rope_scaling": [1]}])
def test_a_strange_config_is_unknown_not_an_error(tmp_path, config):
    facts = hf(tmp_path, config)
    assert (facts.kv, facts.architecture, facts.weights_bytes) == (None, None, 64)


def test_a_tensor_without_values_lies_anywhere(tmp_path):
    entries = {"a": ("F32", [2], 0, 8), "b": ("F32", [0], 0, 0), "c": ("F32", [0, 3], 8, 8)}
    facts = read_model(write(tmp_path / "m", tensors_bytes(entries)))
    assert (facts.weights_bytes, facts.parameters) == (8, 2)


def test_folders_without_a_model_or_with_several_say_so(tmp_path):
    with pytest.raises(UsageError, match="has no models.*Give a GGUF file"):
        read_model(str(tmp_path))
    for name in ("a.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(gguf_bytes(SMALL, ONE))
    assert read_model(str(tmp_path)).name == "a"
    (tmp_path / "b.gguf").write_bytes(gguf_bytes(SMALL, ONE))
    with pytest.raises(UsageError, match="has 2 models.*folder of one model"):
        read_model(str(tmp_path))


def within_s(limit_s, call):
    """What call() raises, in a thread of its own: a hang fails the test."""
    caught = []

    def run():
        try:
            call()
        except UsageError as error:
            caught.append(error)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive() and caught
    return str(caught[0])


def test_what_is_no_file_neither_hangs_nor_is_read(tmp_path):
    os.mkfifo(str(tmp_path / "m.gguf"))
    assert "is no file" in within_s(10, lambda: read_model(str(tmp_path / "m.gguf")))
    assert "is no file" in within_s(10, lambda: read_model(str(tmp_path)))
    assert "is no file" in within_s(10, lambda: read_model("/dev/zero"))
    folder = tmp_path / "hf"
    folder.mkdir()
    os.mkfifo(str(folder / "README.md"))
    assert hf(folder, LLAMA_31_8B).license is None
    (folder / "config.json").unlink()
    os.mkfifo(str(folder / "config.json"))
    assert "config.json is no file" in within_s(10, lambda: read_model(str(folder)))


def test_links_in_a_circle_and_files_that_are_not_there_or_not_ours(tmp_path):
    os.symlink("b.gguf", str(tmp_path / "a.gguf"))
    os.symlink("a.gguf", str(tmp_path / "b.gguf"))
    for path in (str(tmp_path / "a.gguf"), str(tmp_path / "none.gguf"), "a\0b", "",
                 str(tmp_path / ("x" * 5000))):
        with pytest.raises(UsageError, match="cannot read"):
            read_model(path)
    secret = write(tmp_path / "secret.gguf", gguf_bytes(SMALL, ONE))
    os.chmod(secret, 0)
    if os.geteuid():
        with pytest.raises(UsageError, match="Permission denied"):
            read_model(secret)


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for raw in (gguf_bytes(SMALL, ONE), gguf_bytes(SMALL, ONE)[:90], b"", b"{" * 40, None):
        path = write(tmp_path / "m", raw) if raw is not None else str(tmp_path)
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            try:
                read_model(path)
            except UsageError:
                pass
        assert len(os.listdir("/dev/fd")) == before


def with_vocabulary(folder, count):
    words = b"".join(text("token%d" % number) for number in range(count))
    return small(folder, {
        "tokenizer.tokens": (ARRAY, struct.pack("<IQ", TEXT, count) + words),
        "tokenizer.scores": (ARRAY, struct.pack("<IQ", F32, count) + bytes(4 * count))})


def test_the_vocabulary_of_a_large_model_is_passed_over_fast(tmp_path):
    path = with_vocabulary(tmp_path, 262144)
    begin = time.process_time()
    assert read_model(path).layers == 2
    assert time.process_time() - begin < 4


def test_what_is_passed_over_is_not_kept(tmp_path):
    path = with_vocabulary(tmp_path, 20000)
    tracemalloc.start()
    try:
        read_model(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300000 < os.path.getsize(path)


def test_a_header_that_goes_on_for_ever_ends(tmp_path, monkeypatch):
    path = str(tmp_path / "m.gguf")
    with open(path, "wb") as handle:  # sparse: a list of texts that are all empty
        handle.write(gguf_bytes([("k", (ARRAY, struct.pack("<IQ", TEXT, 1 << 40)))], weights=b""))
        handle.truncate(1 << 40)
    monkeypatch.setattr(b9agent, "HEADER_MAX_BYTES", 1 << 20)
    with pytest.raises(UsageError, match="a header of more than 1 MiB"):
        read_model(path)
    monkeypatch.setattr(b9agent, "HEADER_MAX_BYTES", 1 << 30)
    monkeypatch.setattr(b9agent, "HEADER_LIMIT_S", 0.0)
    with pytest.raises(UsageError, match="longer than 0 s to read"):
        read_model(path)


def test_fuzzed_headers_end_in_facts_or_in_a_usage_error(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    card = {"general.file_type": 15, "general.name": "x", "tokens": ["a", "b"],
            "llama.attention.key_length": 16, "llama.attention.sliding_window": 64,
            "llama.rope.scale": (F32, bytes(4))}
    seeds = [gguf_bytes(dict(SMALL, **card), [("a", (32, 8), 0, 0), ("b", (256,), 12, 1024)]),
             tensors_bytes({"a": ("F32", [2, 2], 0, 16), "b": ("U8", [3], 16, 19)}, {"k": "v"})]
    spots = strategies.lists(strategies.tuples(
        strategies.integers(0, 700), strategies.sampled_from(
            [b"\xff", b"\0", b"\x80", b"\1", b"\xff" * 8, HUGE, struct.pack("<I", ARRAY),
             struct.pack("<I", TEXT), b"[", b"\"", b"{", b",", b"-", b"1e999", b"null"])),
        max_size=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=600)
    @hypothesis.given(strategies.sampled_from(seeds), spots, strategies.integers(0, 2000))
    def check(seed, changes, cut):
        raw = bytearray(seed)
        for at, change in changes:
            raw[at % len(raw):at % len(raw) + len(change)] = change
        path = write(tmp_path / "fuzzed", bytes(raw[:len(raw) - cut] if cut < 900 else raw))
        try:
            facts = read_model(path)
        except UsageError as error:
            assert path in error.what and error.hint
        else:
            assert isinstance(facts, ModelFacts)
            assert isinstance(estimate_fit(facts, 24 * GIB).message, str)
    begin = time.process_time()
    check()
    assert time.process_time() - begin < 6
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024 * (1024 if os.uname().sysname == "Darwin" else 1)


def test_fuzzed_configs_end_in_facts(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    keys = sorted({key for _, names in b9agent._CONFIG_FIELDS for key in names.split()}
                  | {"layer_types", "rope_scaling", "quantization_config", "architectures",
                     "text_config", "use_sliding_window", "model_type", "linear_num_value_heads"})
    scalars = strategies.one_of(
        strategies.none(), strategies.booleans(), strategies.sampled_from(
            [0, 1, 2, 64, 4096, -1, 1 << 40, 1e308, 0.5, "yarn", "gemma3", "full_attention", ""]))
    values = strategies.recursive(scalars, lambda inner: strategies.one_of(
        strategies.lists(inner, max_size=4), strategies.dictionaries(
            strategies.sampled_from(["type", "factor", "bits", "quant_method", "num_hidden_layers",
                                     "original_max_position_embeddings"]), inner, max_size=3)),
        max_leaves=5)

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=150)
    @hypothesis.given(strategies.dictionaries(strategies.sampled_from(keys), values))
    def check(config):
        facts = hf(tmp_path, config)
        fit = estimate_fit(facts, 24 * GIB, 4096)
        assert facts.weights_bytes == 64 and fit.kv_bytes is None or fit.kv_bytes >= 0
    check()


# -- does it fit ----------------------------------------------------------

def facts_with(weights_bytes, kv=(KvLayers(32, 2048),), context=131072, kind="gguf"):
    return ModelFacts("m", "/m", kind, weights_bytes=weights_bytes, kv=kv, context_tokens=context)


def test_a_fit_says_what_goes_where_and_how_much_context_would_fit(tmp_path):
    """12 GB of a GPU for Llama 3.1 8B in Q4_K_M: the 131,072 tokens that llama.cpp took from the
    file were too many (ggml-org/llama.cpp, issue 9517)."""
    facts = llama_31_8b_q4_k_m(tmp_path / "m.gguf")
    fit = estimate_fit(facts, 11 * GIB, 131072)
    assert fit.fits is False and fit.message == (
        "needs 21.3 GiB (weights 4.6 GiB, KV cache 16.0 GiB for 131072 tokens, overhead 768 MiB), "
        "11.0 GiB free: does not fit by 10.3 GiB; 46336 tokens would")
    assert fit.largest_context_tokens == 46336
    assert estimate_fit(facts, 11 * GIB, 46336).fits is True
    assert estimate_fit(facts, 11 * GIB, 46337).fits is False
    assert estimate_fit(facts, 11 * GIB).message == (
        "needs 6.3 GiB (weights 4.6 GiB, KV cache 1.0 GiB for 8192 tokens, overhead 768 MiB), "
        "11.0 GiB free: fits; up to 46336 tokens would")
    assert estimate_fit(facts, 11 * GIB, 8192, parallel=4).kv_bytes == 4 * GIB


def test_a_fit_adds_up():
    fit = estimate_fit(facts_with(10 * GIB), 20 * GIB, 8192, parallel=2)
    assert fit[:7] == (10 * GIB, 2 * GIB, 512 * MIB + GIB // 2, 13 * GIB, 20 * GIB, 8192, True)
    assert "KV cache 2.0 GiB for 8192 tokens in 2 sequences each" in fit.message
    assert fit.largest_context_tokens == 36864  # 9 GiB at 256 KiB a token
    assert estimate_fit(facts_with(10 * GIB), 13 * GIB, 8192, 2).fits is True
    assert estimate_fit(facts_with(10 * GIB), 13 * GIB - 1, 8192, 2).fits is False


def test_overhead_covers_what_vllm_measured():
    """Llama 3 8B on one GPU: 1.26 GiB of activations, and 0.33 of what is not torch's; on two, that
    much on each (vllm-project/vllm, pull request 10511 and issue 14452)."""
    one = b9agent.overhead_bytes(facts_with(int(14.96 * GIB), kind="safetensors"))
    two = b9agent.overhead_bytes(facts_with(int(21.1 * GIB), kind="safetensors"), gpus=2)
    large = b9agent.overhead_bytes(facts_with(int(30.71 * GIB), kind="safetensors"))
    assert one >= 1.59 * GIB and two >= 2 * 1.34 * GIB and large >= 1.56 * GIB
    assert max(one, large) < 2.1 * GIB and two < 4 * GIB


def test_weights_that_are_too_much_alone_fit_with_no_context():
    fit = estimate_fit(facts_with(24 * GIB), 24 * GIB, 256)
    assert fit.message.endswith("does not fit by 1.7 GiB; fewer tokens would not help")
    assert (fit.fits, fit.largest_context_tokens) == (False, 0)


def test_what_is_unknown_leaves_the_answer_open_unless_it_is_no_anyway():
    unknown = facts_with(10 * GIB, kv=None)
    fit = estimate_fit(unknown, 20 * GIB)
    assert (fit.fits, fit.needed_bytes, fit.kv_bytes, fit.largest_context_tokens) == (None,) * 4
    assert fit.message == (
        "needs at least 11.0 GiB (weights 10.0 GiB, KV cache unknown for 8192 tokens, overhead "
        "1.0 GiB), 20.0 GiB free: unknown whether it fits")
    assert estimate_fit(unknown, 5 * GIB).fits is False
    blind = estimate_fit(facts_with(10 * GIB), None)
    assert (blind.fits, blind.needed_bytes) == (None, 12 * GIB)
    assert "unknown free: unknown whether it fits" in blind.message
    assert estimate_fit(facts_with(None), 20 * GIB).fits is None


def test_a_short_context_of_the_model_is_the_default_and_the_most():
    fit = estimate_fit(facts_with(GIB, context=2048), 80 * GIB)
    assert (fit.context_tokens, fit.largest_context_tokens) == (2048, 2048)
    assert fit.message.endswith("free: fits")
    assert estimate_fit(facts_with(GIB, context=100), 80 * GIB).largest_context_tokens == 100
    assert estimate_fit(facts_with(GIB, context=2048), 80 * GIB, 4096).message.endswith(
        "free: fits; the model was made for 2048 tokens")


def test_a_model_without_a_cache_fits_by_its_weights():
    fit = estimate_fit(facts_with(GIB // 2, kv=(), context=512), 2 * GIB)
    assert (fit.fits, fit.kv_bytes) == (True, 0) and "KV cache 0 MiB" in fit.message
