#!/usr/bin/env python3
"""weights_export.py: published weights of Wan2.1 and OSP-Next into a file osp reads; text in, video out.

  python3 weights_export.py dit OSP-Next-14B/ -o osp.safetensors
  python3 weights_export.py dit OSP-Next-14B/ --lora lora-checkpoint-28/ -o tuned.safetensors
  python3 weights_export.py text "a red fox runs" -o fox.safetensors --encoder Wan2.1-T2V-1.3B-Diffusers/
  python3 weights_export.py video latent.safetensors -o fox.mp4 --vae Wan2.1-T2V-1.3B-Diffusers/

What decides the result is never guessed: an option is asked for, and what is assumed is printed.
Tensors pass some rows at a time, so 14B weights need no memory; a file appears under its name when complete.
"""
import argparse, contextlib, html, json, math, os, re, shlex, struct, sys
import copy, filecmp, functools, io, pathlib, subprocess, tempfile, unittest.mock
import numpy as np


# --------------------------------------------------------------------------------------- 1. errors and output
class Error(Exception):
    """What, where, what to do: main() prints it as one line and exits 2. Where a folder src holds several
    models, a command for each follows: with one of `paths` in place of src, or one of `adapters`."""
    def __init__(self, message, src=None, paths=(), adapters=()):
        super().__init__(message)
        self.src, self.paths, self.adapters = src, paths, adapters


def need(*packages):
    """Import packages that only some commands need."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
    try:
        return [__import__(p) for p in packages]
    except ImportError as e:
        wanted = " ".join(packages).replace("transformers", "transformers sentencepiece").replace("_", "-")
        raise Error(f"{e.name} is not installed: python3 -m pip install {wanted}")


@contextlib.contextmanager
def new_file(path):
    """An open file under a temporary name, which becomes `path` if all goes well."""
    temp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temp, "wb") as f:
            yield f
        os.replace(temp, path)
    finally:
        if os.path.exists(temp):
            os.unlink(temp)


# -------------------------------------------------------------------------------- 2. bf16 and HiF8 (spec §6)
RAW = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}


def hif8_tables():
    """The value of each code; the code of each float32 by its top 13 bits, which say on which side of the
    middle between two neighbouring values it lies: rounding half away from zero."""
    value = np.zeros(128)
    value[1:8] = 2.0 ** np.arange(-22, -15)
    for dot, width, m in (0x08, 0, 3), (0x10, 1, 3), (0x20, 2, 3), (0x40, 3, 2), (0x60, 4, 1):
        c = np.arange(1 << (width + m))                     # exponent field of `width` bits, mantissa
        field, lead = c >> m, 1 << width >> 1               # field: E's sign, |E| without its leading 1
        E = np.where(field & lead, -1, 1) * (field & (lead - 1) | lead)
        value[dot + c] = 2.0 ** E * (1 + (c & (1 << m) - 1) / (1 << m))
    rising = np.argsort(value)                              # the last, 0x6F, is Inf: here still 1.5·2^15
    middle = (value[rising][1:] + value[rising][:-1]) / 2
    x = (np.arange(8192, dtype=np.uint32) << 19).view(np.float32)
    code = rising[np.searchsorted(middle, abs(x), side="right")]
    code = np.where(np.isnan(x), 0x80, np.where(code, code | np.signbit(x) << 7, 0))
    value[0x6F] = np.inf
    value = np.concatenate([value, -value])
    value[0x80] = np.nan                                    # in the place of -0
    return value.astype(np.float32), code.astype(np.uint8)


np.seterr(invalid="ignore")                                 # NaN is looked for where it matters
HIF8_VALUE, HIF8_CODE = hif8_tables()


def to_f32(raw, dtype, k=None):
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return HIF8_VALUE[raw] / k if dtype == "U8" else raw.astype(np.float32, copy=False)


def from_f32(x, dtype, k=None):
    if dtype == "BF16":                                     # to nearest, ties to even; no NaN comes here
        u = np.ascontiguousarray(x).view(np.uint32)
        return ((u + (0x7FFF + (u >> 16 & 1))) >> 16).astype(np.uint16)
    return HIF8_CODE[np.ascontiguousarray(x * k).view(np.uint32) >> 19] if dtype == "U8" else x


# ----------------------------------------------------------------------------------------- 3. tensors on disk
class Tensor:
    """A tensor left where it is: read(lo, hi) gives elements lo..hi of its flat data, as bits of dtype."""
    def __init__(self, dtype, shape, read, k=None):
        self.dtype, self.shape, self.read, self.k = dtype, tuple(shape), read, k        # k: HiF8's scale
        self.size = math.prod(self.shape)

    def f32(self, lo, hi):
        return to_f32(self.read(lo, hi), self.dtype, self.k)

    def array(self):
        return self.f32(0, self.size).reshape(self.shape)

    def chunks(self):
        """Ranges of whole rows, about 4 million elements each."""
        row = math.prod(self.shape[1:])
        step = max(1, (1 << 22) // row) * row
        return [(lo, min(lo + step, self.size)) for lo in range(0, self.size, step)]


def in_memory(x):
    return Tensor("F32", x.shape, lambda lo, hi: x.reshape(-1)[lo:hi])


def read_safetensors(path):
    """({name: Tensor}, metadata). Reads, not mmap: mapped pages would count as memory."""
    size, tensors = os.path.getsize(path), {}
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(n) if n <= size - 8 else b"")
            meta = header.pop("__metadata__", {})
            entries = [(name, h["dtype"], h["shape"], *h["data_offsets"]) for name, h in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Error(f"{path}: no safetensors header, or cut short: fetch it again (git lfs pull)")
    for name, dtype, shape, lo, hi in entries:
        if dtype not in RAW:
            raise Error(f"{path}: {name} is {dtype}; F32, BF16, F16, HiF8 are read: convert it first")
        if lo < 0 or hi == lo or hi - lo != math.prod(shape) * RAW[dtype].itemsize or 8 + n + hi > size:
            raise Error(f"{path}: {name} {shape} does not fit in {size} bytes: cut short? fetch it again")

        def read(lo, hi, raw=RAW[dtype], start=8 + n + lo):
            return np.fromfile(path, raw, hi - lo, offset=start + lo * raw.itemsize)
        tensors[name] = Tensor(dtype, shape, read)
    return tensors, meta


def read_torch(path):
    """A state dict of torch.save, mapped, unpickled as data only (weights_only: nothing in it can run)."""
    torch, = need("torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        raise Error(f"{path}: more than a state_dict(), or cut short: fetch it again, or save that alone")
    inside = [x for x in state.values() if isinstance(x, dict)] if isinstance(state, dict) else []
    state = inside[0] if len(inside) == 1 else state        # {"state_dict": weights, "epoch": 3}
    dtypes, tensors = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}, {}
    for name, t in state.items() if isinstance(state, dict) else [("it", state)]:
        if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
            raise Error(f"{path}: {name} is no tensor of 16- or 32-bit floats: save one state_dict()")

        def read(lo, hi, t=t, raw=RAW[dtypes[t.dtype]]):
            return t.reshape(-1)[lo:hi].view(torch.uint8).numpy().view(raw)
        tensors[name] = Tensor(dtypes[t.dtype], t.shape, read)
    return tensors, {}


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
ADAPTERS = ("adapter_model.", "pytorch_lora_weights.")      # as peft and diffusers name a LoRA
NO_MODEL = re.compile(r"^\.|(^|[^a-z])(vae|(um)?t5|clip|text_enc|image_enc|tokenizer|optim|scheduler|rng|"
                      r"training_args|random_states|dataloader)", re.IGNORECASE)


def shards(path):
    """All files of the set that a numbered shard belongs to, or the file alone."""
    m = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\..*)", path)
    return [f"{m[1]}{i + 1:05}-of-{m[2]}{m[3]}" for i in range(int(m[2]))] if m else [path]


def models_below(src, adapters=False):
    """{path to give: files} of the models (or adapters) in a folder or, if none, in those below."""
    found = {}
    for folder, below, names in os.walk(src):
        below[:] = sorted(d for d in below if not NO_MODEL.search(d))
        here = {}
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(WEIGHTS) and name.startswith(ADAPTERS) == adapters and not NO_MODEL.search(name):
                here.setdefault(tuple(shards(path)), path)
        found.update({folder if len(here) == 1 else path: files for files, path in here.items()})
        if folder == src and here:
            break
    return found


def weight_files(src, adapters=False):
    """The files of the one model (or adapter) that src is: a file, any of its shards, a folder with one."""
    if not os.path.exists(src):
        raise Error(f"{src}: no such file or folder")
    found = models_below(src, adapters) if os.path.isdir(src) else {src: shards(src)}
    if len(found) != 1:
        others = [] if adapters else list(models_below(src, adapters=True))
        hint = "take one" if found or others else f"give a {', '.join(WEIGHTS)} file, or its folder"
        kind = "adapters" if adapters else f"models and {len(others)} adapters"
        raise Error(f"{src}: {len(found)} {kind} in it: {hint}", src, list(found), others)
    files = found.popitem()[1]
    missing = [f for f in files if not os.path.isfile(f)]
    if missing:
        raise Error(f"{missing[0]} is missing, {len(missing)} of {len(files)} shards: fetch the folder")
    return files


def load(src, config="config.json"):
    """A model's (or adapter's) tensors under their own names, and its config: an osp file's own, or JSON."""
    tensors, given, files = {}, {}, weight_files(src, adapters=config != "config.json")
    for path in files:
        more, meta = (read_torch if path.endswith(WEIGHTS[1:]) else read_safetensors)(path)
        tensors.update(more)
        given.update(meta if "dim" in meta or "lora_alpha" in meta else {})
    path = pathlib.Path(files[0]).with_name(config)
    try:
        given = given or (dict(json.loads(path.read_text())) if path.exists() else {})
    except (ValueError, TypeError):
        raise Error(f"{path}: no JSON object: fetch the file again")
    for name in [n for n, t in tensors.items() if t.dtype == "U8"]:
        if name + ".scale" not in tensors:
            raise Error(f"{src}: {name} is U8 without {name}.scale, no HiF8: export the original again")
        tensors[name].k = tensors.pop(name + ".scale").array()[0]
    return tensors, given


# ----------------------------------------------------------------------------- 4. names and shapes (spec §2)
WRAPPERS = re.compile(r"^((base_model\.model|model|module|transformer|diffusion_model)\.)+|"
                      r"_(fsdp|checkpoint)_wrapped_module\.|_orig_mod\.")
DIFFUSERS = [                                               # its words, and those of spec §2
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."), (".attn1.", ".self_attn."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."), (".attn2.", ".cross_attn."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."), (".to_q.", ".q."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."), (".to_k.", ".k."), (".to_v.", ".v."),
    ("condition_embedder.time_proj.", "time_projection.1."), (".to_out.0.", ".o."), (".norm2.", ".norm3."),
    (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."), ("proj_out.", "head.head."),
    (".scale_shift_table", ".modulation")]
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")


def spec_name(name):
    """The name in spec §2, which is Wan's and OSP-Next's; diffusers has its own."""
    name = WRAPPERS.sub("", name)
    for theirs, ours in DIFFUSERS:
        name = name.replace(theirs, ours)
    return "head.modulation" if name == "scale_shift_table" else name


def spec_shapes(c):
    dim, shapes = c["dim"], {}

    def linear(name, rows, *columns):
        shapes[name + ".weight"], shapes[name + ".bias"] = (rows, *columns), (rows,)
    linear("patch_embedding", dim, c["in_dim"], 1, 2, 2)
    for name, columns in ("text_embedding", c["text_dim"]), ("time_embedding", c["freq_dim"]):
        linear(name + ".0", dim, columns)
        linear(name + ".2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for block in (f"blocks.{i}." for i in range(c["num_layers"])):
        shapes[block + "modulation"] = (1, 6, dim)
        for attn in block + "self_attn.", block + "cross_attn.":
            for x in "qkvo":
                linear(attn + x, dim, dim)
            shapes[attn + "norm_q.weight"] = shapes[attn + "norm_k.weight"] = (dim,)
        linear(block + "norm3", dim)
        linear(block + "ffn.0", c["ffn_dim"], dim)
        linear(block + "ffn.2", dim, c["ffn_dim"])
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", 4 * c["out_dim"], dim)
    if c["vocab"]:
        shapes["text_encoder.weight"] = (c["vocab"], c["text_dim"])      # a toy's table of words
    return shapes


class Settings:
    """What tensors do not tell: an option, else the config, else a default that is reported."""
    def __init__(self, given, args, where):
        self.given, self.args, self.where, self.assumed = given, args, where, []

    def number(self, key, default, known=True):
        said = getattr(self.args, key, None)
        said = self.given.get(key) if said is None and known else said
        if said in (None, ""):
            self.assumed.append(f"{key} {default}")
            return default
        try:
            return type(default)(said)
        except (TypeError, ValueError):
            raise Error(f"{self.where}: its config says {key} {said}: a number is expected")

    def insist(self, reason, **only):
        """Where the config says anything else, osp would compute another model."""
        for key, value in only.items():
            if self.given.get(key) not in (None, value, str(value)):
                raise Error(f"{self.where}: its config says {key} {self.given[key]}, not {value}: {reason}")


def model_config(shapes, s):
    """Sizes come from the tensors, the rest from the settings s."""
    def size(name, axis):
        if len(shapes.get(name, ())) <= axis:
            raise Error(f"{s.where}: no matrix {name} by Wan's or diffusers' names: is it the whole DiT?")
        return shapes[name][axis]
    dim = size("patch_embedding.weight", 0)
    c = dict(dim=dim, ffn_dim=size("blocks.0.ffn.0.weight", 0), num_heads=s.number("num_heads", dim // 128),
             num_layers=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
             num_full_blocks=0, sparse_ratio=1, in_dim=size("patch_embedding.weight", 1),
             out_dim=size("head.head.weight", 0) // 4, text_dim=size("text_embedding.0.weight", 1),
             text_len=s.number("text_len", 512), freq_dim=size("time_embedding.0.weight", 1),
             eps=s.number("eps", 1e-6), quant=0, quant_attn=0,
             vocab=size("text_encoder.weight", 0) if "text_encoder.weight" in shapes else 0)
    if c["num_heads"] < 1 or dim % (2 * c["num_heads"]):
        raise Error(f"{s.where}: dim {dim} over {c['num_heads']} heads gives no even size: give --heads N")
    sizes = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim")
    s.insist("so say its tensors: is the checkpoint whole?", **{key: c[key] for key in sizes})
    s.insist("osp computes text-to-video models only", model_type="t2v")
    for key in "quant", "quant_attn":
        c[key] = int(s.given.get(key) in (1, "1", "hif8") if s.args.hif8 is None else s.args.hif8)
        if c[key]:
            s.insist("osp's HiF8 has it fixed", scale_max_forward=15, scale_max_backward=224)
    c["num_full_blocks"], c["sparse_ratio"] = layout(c["num_layers"], s)
    return c


def layout(L, s):
    """(full blocks of L, sparse ratio): by the options, else the config; where both are silent, refused."""
    wan = s.given.get("_class_name") in ("WanModel", "WanTransformer3DModel")
    kind = "full" if wan else s.given.get("skiparse_model_type")
    if kind is None and "num_full_blocks" in s.given:       # a file of osp's
        kind = "full" if s.given["num_full_blocks"] == str(L) else "dual_end"
    wanted = s.args.layout or (kind if s.args.num_full_blocks is None else "hybrid")
    if wanted is None or (s.args.hif8 is None and not s.given):
        raise Error(f"{s.where}: no config.json says which blocks are sparse and whether HiF8 is used: give "
                    "--layout hybrid (OSP-Next) or full (Wan2.1), and --hif8 or --no-hif8")
    if wanted == "full":
        return L, 1
    s.insist("osp's sparse blocks are Skiparse-2D", skiparse_1d=False, skiparse_2d=True)
    F = s.number("num_full_blocks", min(8, L // 8 * 4), known=kind in ("dual_end", "uniform"))
    P = s.number("sparse_ratio", 2, known=kind in ("dual_end", "uniform"))
    if F > 0 and kind != "full":
        s.insist(f"osp has the {F} full blocks at both ends", skiparse_model_type="dual_end")
    if L % 2 or F % 4 or not 0 <= 2 * F <= L or P < 2:
        raise Error(f"{s.where}: {F} full blocks of {L}, sparse ratio {P}: expected a multiple of 4, at most "
                    "half, and a ratio from 2: give --full-blocks F, --sparse-ratio P or --layout full")
    return F, P


def load_model(args):
    """(tensors under spec names, config, what was assumed): complete, or an Error."""
    src, (found, given) = args.src, load(args.src)
    tensors = {spec_name(n): t for n, t in found.items()}
    for pattern, what in (
            ("img|image_embedder|add_[kv]_proj", "an image-to-video model: osp has text-to-video only"),
            (r"lora_|\.base_layer\.", "a LoRA in training: dit MODEL --lora THIS -o FILE merges it")):
        odd = [n for n in tensors if re.search(pattern, n)]
        if odd:
            raise Error(f"{src}: {odd[0]} belongs to {what}")
    if "num_attention_heads" in given:                      # diffusers' word
        given["num_heads"] = given["num_attention_heads"]
    settings = Settings(given, args, src)
    have = {n: list(t.shape) for n, t in tensors.items()}
    config = model_config(have, settings)
    want = {n: list(shape) for n, shape in spec_shapes(config).items()}
    odd = sorted(n for n in {**have, **want} if have.get(n) != want.get(n))
    if odd:
        raise Error(f"{src}: {len(odd)} tensors are odd: {odd[0]} is {have.get(odd[0], 'missing')}, expected "
                    f"{want.get(odd[0], 'no such name')}: is it one whole DiT?")
    config.update({k: given[k] for k in ("T", "H_l", "W_l") if given.get(k, "0") != "0"})   # a toy's clips
    return {n: tensors[n] for n in want}, config, settings.assumed


# ------------------------------------------------------------------------------------------------- 5. writing
def stored_as(name, shape, dtype):
    """f32: all F32. bf16: matrices BF16. hif8: the blocks' matrices HiF8, other matrices BF16. Vectors
    (biases, norms, modulation) are always F32: a thousandth of the bytes, each acting on every token."""
    if dtype == "f32" or len(shape) == 1 or name.endswith("modulation"):
        return "F32"
    return "U8" if dtype == "hif8" and BLOCK_MATRIX.fullmatch(name) else "BF16"


def write_weights(path, plan, meta):
    """A safetensors file of (name, dtype, Tensor): header first, as shapes are known, then data."""
    scale = {}                                              # k = 15 / max|x|; kept: hif8(x·k) and k
    for name, dtype, t in plan:
        if dtype == "U8":
            largest = max(abs(t.f32(lo, hi)).max() for lo, hi in t.chunks())
            scale[name] = t.k or np.float32(15) / np.maximum(largest, np.float32(1e-8))
    plan = plan + [(name + ".scale", "F32", in_memory(np.array([k]))) for name, k in scale.items()]
    plan.sort(key=lambda entry: -RAW[entry[1]].itemsize)    # so everything stays aligned
    header, end = {"__metadata__": {k: str(v) for k, v in meta.items()}}, 0
    for name, dtype, t in plan:
        begin, end = end, end + t.size * RAW[dtype].itemsize
        header[name] = dict(dtype=dtype, shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, t in plan:
            for lo, hi in t.chunks():
                raw = t.read(lo, hi)
                x = to_f32(raw, t.dtype, t.k)
                if len(raw) != hi - lo or not np.isfinite(x).all():
                    raise Error(f"{name}: holds NaN or Inf, or its file changed: fetch the source again")
                data = raw if t.dtype == dtype else from_f32(x, dtype, scale.get(name))
                f.write(memoryview(data).cast("B"))
    return 8 + len(text) + end


# ------------------------------------------------------------------------------------------------ 6. commands
def dit(args):
    """Checkpoint, perhaps with a LoRA merged -> one file for osp."""
    tensors, c, assumed = load_model(args)
    if args.lora:
        tensors = merge(tensors, *read_lora(args.lora, args.alpha), args.lora)
    plan = [(n, stored_as(n, t.shape, args.dtype), t) for n, t in tensors.items()]
    size = write_weights(args.output, plan, dict(c, eps=np.format_float_positional(c["eps"])))
    print(f"{args.output}: {size / 1e9:.2f} GB, {args.dtype}, {c['num_full_blocks']} of {c['num_layers']} "
          f"blocks full, {'HiF8' if c['quant'] else 'no HiF8'}; assumed: {', '.join(assumed) or 'nothing'}")


def read_lora(src, alpha):
    """{matrix: (A [r, in], B [out, r])} and alpha/r, of a peft adapter or of a LoRA file that osp wrote."""
    tensors, given = load(src, "adapter_config.json")
    if given.get("alpha_pattern") or given.get("rank_pattern") or given.get("use_dora"):
        raise Error(f"{src}: DoRA, or alpha or rank by layer: merge it with peft's merge_and_unload()")
    whole = any(".base_layer." in n for n in tensors)       # a model in training: the rest is its base
    pairs = {}
    for name, t in tensors.items():
        m = re.fullmatch(r"(.*)\.lora_([AB])\.(?:default\.)?weight", name)
        if m and len(t.shape) == 2:
            pairs.setdefault(spec_name(m[1] + ".weight"), {})[m[2]] = t.array()
        elif not whole:
            raise Error(f"{src}: {name} is no lora_A or lora_B matrix: give a LoRA of peft's or osp's")
    ranks = {p[x].shape[x == "B"] if x in p else 0 for p in pairs.values() for x in "AB"}
    said = float(given.get("lora_rank", given.get("r", max(ranks, default=0))))
    if ranks != {said} or not said:
        raise Error(f"{src}: ranks {sorted(ranks)}, expected {said:g} (0: half a pair is absent)")
    alpha = given.get("lora_alpha") if alpha is None else alpha
    if alpha is None:
        raise Error(f"{src}: neither it nor an adapter_config.json says lora_alpha: give --alpha (paper: 64)")
    scale = float(alpha) / (math.sqrt(said) if given.get("use_rslora") else said)
    return {n: (p["A"], p["B"]) for n, p in pairs.items()}, scale


def merge(tensors, pairs, scale, where):
    """W + alpha/r · B·A, rows at a time."""
    def merged(t, A, B, row):
        return Tensor(None, t.shape, lambda lo, hi:
                      t.f32(lo, hi) + np.float32(scale) * (B[lo // row:hi // row] @ A).reshape(-1))
    odd = [n for n, (A, B) in pairs.items() if n not in tensors or tensors[n].shape != (len(B), A.shape[1])]
    if odd:
        raise Error(f"{where}: {odd[0]} is not in the model, or not of that shape: is this its adapter?")
    print(f"{where}: {len(pairs)} matrices merged, alpha/r = {scale:g}")
    return {n: merged(t, *pairs[n], t.shape[1]) if n in pairs else t for n, t in tensors.items()}


# Wan's own negative prompt: gaudy, overexposed, static, blurred, subtitles, ugly, deformed hands ...
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，"
            "画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
            "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
            "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
            "三条腿，背景人很多，倒着走")


def clean(prompt):
    """As OSP-Next and Wan do it: broken encodings mended, HTML unescaped twice, one space between words."""
    return " ".join(html.unescape(html.unescape(need("ftfy")[0].fix_text(prompt))).split())


def pretrained(cls, folder, part, **options):
    """cls from a diffusers folder, which holds text_encoder/, tokenizer/ and vae/, or from that part."""
    parts = filter(os.path.isdir, (os.path.join(folder, part), folder))
    try:
        return cls.from_pretrained(next(parts, folder), local_files_only=True, **options)
    except Exception as e:
        raise Error(f"{folder}: no {cls.__name__} here ({str(e)[:120]}): give a diffusers folder of Wan2.1; "
                    "any size serves OSP-Next too, e.g. Wan2.1-T2V-1.3B-Diffusers; Wan's .pth files do not")


def text(args):
    """Prompt and negative prompt -> text_cond, text_uncond [text_len, text_dim], zeros after the tokens."""
    _, torch, transformers = need("ftfy", "torch", "transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = pretrained(transformers.AutoTokenizer, args.encoder, "tokenizer")
    encoder = pretrained(transformers.UMT5EncoderModel, args.encoder, "text_encoder", dtype=torch.bfloat16)
    encoder, meta, plan = encoder.eval().to(device), {}, []
    for kind, name, prompt in ("prompt", "text_cond", args.src), ("negative", "text_uncond", args.negative):
        meta[kind] = clean(prompt)
        tokens = tokenizer(meta[kind], padding="max_length", max_length=args.text_len, truncation=True,
                           return_tensors="pt").to(device)
        with torch.no_grad():
            x = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float().cpu().numpy()
        meta[kind + "_rows"] = int(tokens.attention_mask.sum())
        x[meta[kind + "_rows"]:] = 0
        plan.append((name, "F32", in_memory(x)))
    write_weights(args.output, plan, meta)
    print(f"{args.output}: {meta['prompt_rows']} and {meta['negative_rows']} rows, padded to {list(x.shape)}")


def video(args):
    """Latent [16, T, H, W] as the DiT makes it -> Wan's decoder -> MP4 of 4T - 3 frames, 8H x 8W."""
    torch, diffusers, imageio_ffmpeg = need("torch", "diffusers", "imageio_ffmpeg")
    vae = pretrained(diffusers.AutoencoderKLWan, args.vae, "vae", low_cpu_mem_usage=False).eval()
    std, mean = (np.float32(vae.config[key]).reshape(-1, 1, 1, 1) for key in ("latents_std", "latents_mean"))
    latent = read_safetensors(args.src)[0].get("latent")
    if latent is None or len(latent.shape) != 4 or latent.shape[0] != len(std):
        raise Error(f"{args.src}: no latent [{len(std)}, T, H, W] in it: osp sample --text FILE writes one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(latent.array() * std + mean)[None].to(device, vae.dtype)
    with torch.no_grad():
        x = vae.to(device).decode(x).sample[0].float().clamp(-1, 1)
    frames = ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    n, h, w, _ = frames.shape
    with new_file(args.output) as f:
        writer = imageio_ffmpeg.write_frames(f.name, (w, h), fps=args.fps, quality=8, macro_block_size=8,
                                             output_params=["-movflags", "+faststart", "-f", "mp4"])
        writer.send(None)
        for frame in frames:
            writer.send(frame.tobytes())
        writer.close()
    print(f"{args.output}: {n} frames of {w}x{h}, {args.fps} a second")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Error(f"{message}: -h lists the commands and their options")


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="weights_export.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, *source):
        p = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        p.set_defaults(run=run)
        if source:
            p.add_argument("src", metavar=source[0], help=source[1])
            p.add_argument("-o", dest="output", metavar="FILE", required=True, help="what to write")
        return p.add_argument
    option = command(dit, "SRC", "folder or file in Wan's, OSP-Next's or diffusers' naming, or of osp's")
    option("--dtype", choices=["bf16", "f32", "hif8"], default="bf16", help="of matrices, default bf16")
    option("--layout", choices=["hybrid", "full"], help="OSP-Next's or Wan's; default: its config's")
    option("--hif8", action=argparse.BooleanOptionalAction, help="compute in HiF8; default: its config's")
    option("--full-blocks", dest="num_full_blocks", type=int, metavar="F", help="of hybrid, the same, or 8")
    option("--sparse-ratio", type=int, metavar="P", help="of hybrid, the same, or 2")
    option("--heads", dest="num_heads", type=int, metavar="N", help="the same, or dim/128")
    option("--text-len", type=int, metavar="N", help="rows of a prompt, the same, or 512")
    option("--lora", metavar="ADAPTER", help="to merge: peft's folder or file, or osp's")
    option("--alpha", type=float, help="of the adapter, default: what it says")
    option = command(text, "PROMPT", "what to show")
    option("--encoder", required=True, metavar="DIR", help="diffusers folder: text_encoder/, tokenizer/")
    option("--negative", default=NEGATIVE, help="what to lead away from, default Wan's own")
    option("--text-len", type=int, default=512, metavar="N", help="rows, default 512")
    option = command(video, "LATENT", "written by osp sample --text")
    option("--vae", required=True, metavar="DIR", help="diffusers folder of Wan2.1, or its vae/")
    option("--fps", type=int, default=16, help="default 16")
    option = command(test)
    option("--all", action="store_true", help="also what needs torch, transformers, diffusers and osp")
    option("--golden", default="golden", metavar="DIR", help="reference numbers, default golden")
    option("--osp", default="./osp", metavar="PROGRAM", help="default ./osp")
    return parser.parse_args(argv)


def main(argv=None):
    argv, commands = sys.argv[1:] if argv is None else argv, []
    try:
        args = parse(argv)
        return args.run(args) or 0
    except Error as e:
        reason = str(e)
        commands = [[path if word == e.src else word for word in argv] for path in e.paths]
        commands += [["dit", "MODEL", "--lora", path, "-o", "tuned.safetensors"] for path in e.adapters]
    except OSError as e:
        reason = f"{e.filename or args.output}: {e.strerror or e}: choose another path, or free some space"
    except KeyboardInterrupt:
        reason = "stopped: nothing was written"
    print(f"weights_export: {' '.join(reason.split())}", file=sys.stderr)
    for words in commands:
        print(f"  python3 weights_export.py {shlex.join(words)}", file=sys.stderr)
    return 2


# --------------------------------------------------------------------------------------------------- 7. tests
TINY = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=8, num_full_blocks=4, sparse_ratio=2, in_dim=4,
            out_dim=4, text_dim=24, text_len=7, freq_dim=16, eps=1e-6, quant=0, quant_attn=0, vocab=0)
OSP_NEXT = dict(_class_name="OSPNextModel", model_type="t2v", num_heads=2, text_len=7, eps=1e-6, quant=None,
                sparse_ratio=2, skiparse_model_type="dual_end", num_full_blocks=4)
WAN = dict(_class_name="WanTransformer3DModel", num_attention_heads=2, text_len=7, eps=1e-6)


def tiny_weights(**change):
    rng = np.random.default_rng(1)
    weights = {n: rng.normal(0, 0.1, shape) for n, shape in spec_shapes(TINY).items()}
    return {n: np.float32(x) for n, x in {**weights, **change}.items() if x is not None}


def save(path, arrays, **meta):
    from safetensors.numpy import save_file
    save_file({n: np.ascontiguousarray(x, np.float32) for n, x in arrays.items()}, path, meta)


def save_folder(folder, arrays, config, files=1):
    os.makedirs(folder)
    for i in range(files):
        path = os.path.join(folder, f"model-{i + 1:05}-of-{files:05}.safetensors")
        save(path, {n: arrays[n] for n in list(arrays)[i::files]})
    pathlib.Path(folder, "config.json").write_text(json.dumps(config))
    return folder


class Tests:
    """Runs commands in a folder of its own and counts what was as expected."""
    def __init__(self, folder, args):
        self.at, self.folder, self.args = functools.partial(os.path.join, folder), folder, args
        self.out, self.results = self.at("out", "file.safetensors"), []
        os.mkdir(self.at("out"))

    def check(self, name, ok, detail=""):                   # ok None: could not be tried
        self.results.append("skipped" if ok is None else "passed" if ok else "failed")
        print(f"{self.results[-1]}  {name}: {detail}".replace(self.folder + "/", "").rstrip(": "))

    def run(self, *argv, out=None):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main([*argv, "-o", out or self.out]), said.getvalue().strip()

    def expect(self, what, wanted, *argv, commands=()):
        """wanted: metadata that is written; or words of a one-line error, which these commands follow."""
        status, said = self.run(*argv)
        reason, *lines = said.split("\n")
        left = os.listdir(self.at("out"))
        if isinstance(wanted, str):
            ok = status == 2 and re.search(wanted, reason) and not left
            ok = ok and [shlex.split(line)[2:] for line in lines] == list(commands)
        else:
            ok = status == 0 and wanted.items() <= read_safetensors(self.out)[1].items()
        verb, detail = ("refuses", said) if isinstance(wanted, str) else ("takes", "" if ok else said)
        self.check(f"{verb} {what}", bool(ok), detail)
        for name in left:
            os.remove(self.at("out", name))


def test(args):
    """Check this program on tiny random models; --all also against torch, transformers and diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        t = Tests(folder, args)
        golden = read_safetensors(os.path.join(args.golden, "hif8.safetensors"))[0]
        x, code, value = (golden[n].read(0, golden[n].size) for n in ("x", "code", "decode"))
        t.check("hif8: golden codes", (from_f32(x, "U8", 1) == code).all(), f"{len(x)} numbers")
        t.check("hif8: golden values", np.array_equal(HIF8_VALUE, value, equal_nan=True))
        for part in (test_export, test_settings, test_folders, test_lora, test_bad_input,
                     test_osp, test_torch)[:None if args.all else -1]:
            part(t)
    print(", ".join(f"{t.results.count(r)} {r}" for r in ("passed", "failed", "skipped")))
    return 1 if "failed" in t.results else 0


def test_export(t):
    weights, one = tiny_weights(), t.at("one.safetensors")
    theirs = {n: "scale_shift_table" if n == "head.modulation" else n for n in weights}
    for new, old in DIFFUSERS:
        theirs = {n: name.replace(old, new) for n, name in theirs.items()}
    for naming, names in ("Wan's", {}), ("diffusers'", theirs):
        named = {names.get(n, n): w for n, w in weights.items()}
        for files in 1, 3:
            src = save_folder(t.at(f"{naming} {files}"), named, OSP_NEXT, files)
            for dtype, step in ("f32", 0), ("bf16", 2 ** -8), ("hif8", 2 ** -4):
                status, error = t.run("dit", src, "--dtype", dtype, out=one)
                found, meta = load(one)
                ok = meta == {k: "0.000001" if k == "eps" else str(v) for k, v in TINY.items()}
                ok &= all(found[n].dtype == stored_as(n, w.shape, dtype) for n, w in weights.items())
                ok &= all(abs(found[n].array() - w).max() <= step * abs(w).max() for n, w in weights.items())
                t.run("dit", one, "--dtype", dtype)         # a file of osp's gives itself
                ok &= status == 0 and filecmp.cmp(one, t.out, shallow=False)
                t.check(f"dit: {naming} names, {files} files -> {dtype}", ok, error)
    os.remove(t.out)


def test_settings(t):
    src, bare = save_folder(t.at("settings"), tiny_weights(), {}), t.at("bare.safetensors")
    save(bare, tiny_weights())
    hif8 = dict(quant="hif8", quant_attn="hif8")
    for config, options, wanted in (
            ({}, "", dict(num_full_blocks="4", sparse_ratio="2", quant="0")),
            (dict(hif8, scale_max_forward=15.0), "", dict(quant="1", quant_attn="1")),
            (dict(hif8, scale_max_forward=7), "", "scale_max_forward 7, not 15"),
            (dict(hif8, scale_max_backward=15), "", "scale_max_backward 15, not 224"),
            (dict(hif8, scale_max_forward=7), "--no-hif8", dict(quant="0")),
            (dict(skiparse_1d=True), "--layout hybrid", "skiparse_1d True, not False"),
            (dict(skiparse_1d=True), "--layout full", dict(num_full_blocks="8")),
            (dict(num_full_blocks=0), "", dict(num_full_blocks="0")),
            (dict(num_full_blocks=0, skiparse_model_type="uniform"), "", dict(num_full_blocks="0")),
            (dict(skiparse_model_type="uniform"), "", "uniform, not dual_end"),
            (dict(sparse_ratio=1), "", "4 full blocks of 8, sparse ratio 1"),
            (dict(text_len="long"), "", "text_len long: a number"),
            (WAN, "", dict(num_full_blocks="8", sparse_ratio="1", quant="0")),
            (WAN, "--full-blocks 0", dict(num_full_blocks="0", sparse_ratio="2")),
            (None, "", "give --layout hybrid .* or full .*, and --hif8 or --no-hif8"),
            (None, "--layout hybrid", "--hif8 or --no-hif8"),
            (None, "--layout hybrid --hif8", dict(quant="1", num_full_blocks="4")),
            (None, "--layout full --no-hif8 --text-len 7", dict(text_len="7"))):
        said = config if config is WAN else {**OSP_NEXT, **(config or {})}
        pathlib.Path(src, "config.json").write_text(json.dumps(said))
        argv = ["dit", bare if config is None else src, "--heads", "2", *options.split()]
        t.expect(f"config {config} {options}", wanted, *argv)
    said = t.run("dit", bare, *"--heads 2 --layout hybrid --hif8".split())[1]
    t.check("says what it assumes", "text_len 512, eps 1e-06, num_full_blocks 4, sparse_ratio 2" in said)
    os.remove(t.out)


def test_folders(t):
    """Folders as they are released or left by training, and the commands printed for them."""
    for name, quant in ("OSP-Next-14B", None), ("OSP-Next-HiF8-14B", "hif8"):
        save_folder(t.at("hub", name), tiny_weights(), dict(OSP_NEXT, quant=quant), files=2)
    both = [["dit", t.at("hub", name), "-o", t.out] for name in ("OSP-Next-14B", "OSP-Next-HiF8-14B")]
    t.expect("a repository of two", "2 models and 0 adapters in it", "dit", t.at("hub"), commands=both)
    t.expect("the first listed", dict(quant="0"), *both[0][:2])
    t.expect("the second listed", dict(quant="1"), *both[1][:2])
    t.expect("a shard for all", {}, "dit", t.at("hub", "OSP-Next-14B", "model-00002-of-00002.safetensors"))
    save_folder(t.at("pipeline", "transformer"), tiny_weights(), WAN)
    save_folder(t.at("pipeline", "text_encoder"), {"shared.weight": np.ones(3)}, {})
    t.expect("a pipeline's transformer/", dict(num_full_blocks="8"), "dit", t.at("pipeline"))
    run, adapter = t.at("rl", "iter_000000028"), t.at("rl", "lora-checkpoint-28")
    files = [os.path.join(run, n + "model_state_dict.pt") for n in ("ema_", "", "optim_")]
    for path in map(pathlib.Path, (*files, os.path.join(adapter, "adapter_model.bin"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    models = [["dit", path, "-o", t.out] for path in files[:2]]
    merge = ["dit", "MODEL", "--lora", adapter, "-o", "tuned.safetensors"]
    t.expect("EMA beside raw weights", "2 models", "dit", run, commands=models)
    t.expect("an RL run", "2 models and 1 adapters in it", "dit", t.at("rl"), commands=[*models, merge])
    t.expect("an adapter as a model", "0 models and 1 adapters in it", "dit", adapter, commands=[merge])
    t.expect("an empty folder", "give a .safetensors", "dit", os.path.dirname(t.out))


def test_lora(t):
    src, one, rng = t.at("Wan's 1"), t.at("one.safetensors"), np.random.default_rng(2)
    A = {n[:-7]: rng.normal(0, 1, (4, 32)) for n in tiny_weights() if re.search(r"attn\.[qkvo]\.weight", n)}
    B = {n: rng.normal(0, 0.02, (32, 4)) for n in A}
    pairs = {f"base_model.model.{n}.lora_{x}.weight": m[n] for x, m in (("A", A), ("B", B)) for n in A}
    os.mkdir(t.at("peft"))
    save(t.at("peft", "adapter_model.safetensors"), pairs)
    pathlib.Path(t.at("peft", "adapter_config.json")).write_text('{"r": 4, "lora_alpha": 8}')
    for dtype, step in ("bf16", 0.005), ("hif8", 0.05), ("f32", 1e-6):
        t.run("dit", src, "--dtype", dtype, out=one)
        status, error = t.run("dit", src, "--lora", t.at("peft"), "--dtype", dtype, out=t.at("tuned"))
        base, tuned = load(one)[0], load(t.at("tuned"))[0]
        move = {n: 8 / 4 * B[n[:-7]] @ A[n[:-7]] if n[:-7] in A else 0 for n in base}
        off = {n: abs(tuned[n].array() - base[n].array() - move[n]).max() for n in base}
        t.check(f"lora: {dtype}", status == 0 and all(off[n] <= step * (n[:-7] in A) for n in base), error)
    whole, other = t.at("training.safetensors"), t.at("other.safetensors")
    base = {"model." + n.replace(".weight", ".base_layer.weight"): w for n, w in tiny_weights().items()}
    save(whole, {**base, **pairs})
    save(other, {f"blocks.9.self_attn.q.lora_{x}.weight": np.ones((4, 4)) for x in "AB"}, lora_alpha="8")
    t.expect("a LoRA not merged", "dit MODEL --lora THIS", "dit", whole)
    t.expect("an adapter without alpha", "give --alpha", "dit", src, "--lora", whole)
    t.expect("the LoRA of a model in training", {}, "dit", src, "--lora", whole, "--alpha", "8")
    t.expect("a LoRA of another model", "is this its adapter", "dit", src, "--lora", other)


def test_bad_input(t):
    matrix, shard = "blocks.3.ffn.0.weight", "model-00002-of-00003.safetensors"

    def changed(name, files=1, **change):
        return save_folder(t.at(name), tiny_weights(**change), OSP_NEXT, files=files)
    os.remove(os.path.join(changed("gone", 3), shard))
    os.truncate(os.path.join(changed("short", 3), shard), 100000)
    changed("nan", **{matrix: np.full((48, 32), np.nan)})
    for what, wanted, *argv in (
            ("a missing shard", f"{shard} is missing", t.at("gone")),
            ("a truncated shard", "cut short", t.at("short")),
            ("an absent tensor", f"{matrix} is missing, expected", changed("absent", **{matrix: None})),
            ("an extra tensor", "no such name", changed("extra", gate=np.ones(3))),
            ("a wrong shape", r"31\], expected \[48, 32\]", changed("shape", **{matrix: np.ones((48, 31))})),
            *(("NaN", "NaN", t.at("nan"), "--dtype", dtype) for dtype in ("f32", "bf16", "hif8")),
            ("an image-to-video model", "image-to", changed("i2v", img_emb=np.ones(3))),
            ("no DiT", "no matrix patch_embedding", t.at("pipeline", "text_encoder")),
            ("a path that is not there", "no such file", t.at("nowhere")),
            ("an unknown option", "unrecognized", t.at("short"), "--dtyp", "f32")):
        t.expect(what, wanted, "dit", *argv)
    status, error = t.run("dit", t.at("Wan's 1"), out=t.at("nowhere", "x"))
    t.check("refuses an output folder that is not there", status == 2 and "\n" not in error, error)
    ok, words = None, "ftfy is not installed"
    with contextlib.suppress(Error):
        words = clean(" caf\u00c3\u00a9 &amp;amp;lt; the  \u2018fox\u2019\n runs ")
        ok = words == "caf\u00e9 < the 'fox' runs"
    t.check("prompts: ftfy, html twice, spaces", ok, words)
    with unittest.mock.patch.dict(sys.modules, ftfy=None):
        t.expect("a prompt without ftfy", "pip install ftfy", "text", "a fox", "--encoder", "x")


def test_osp(t):
    """osp's own files: here and back bit for bit, its HiF8 codes and its merged LoRA against ours."""
    if not os.path.exists(t.args.osp):
        return t.check("osp's files", None, f"no program {t.args.osp}: make osp")

    def program(command, name, *options):
        argv = [t.args.osp, *command.split(), *options, "-o", t.at(name)]
        subprocess.run(argv, check=True, capture_output=True)

    def tensors(name):
        found = read_safetensors(t.at(name))[0].items()
        return {n: (x.dtype, x.shape, x.read(0, x.size).tobytes()) for n, x in found}
    program("train --preset tiny --steps 2", "a")
    t.run("dit", t.at("a"), "--dtype", "f32", out=t.at("b"))
    program("train --steps 0", "c", "--init", t.at("b"))
    t.check("osp's file -> dit -> osp, bit for bit", tensors("a") == tensors("b") == tensors("c"))
    program("train --steps 0 --dtype hif8", "d", "--init", t.at("a"))
    t.run("dit", t.at("a"), "--dtype", "hif8", out=t.at("e"))
    d, e = ({n: x for n, x in tensors(name).items() if BLOCK_MATRIX.match(n)} for name in "de")
    t.check("osp's HiF8 codes and scales, bit for bit", len(d) > 0 and d == e, f"{len(d) // 2} matrices")
    grpo = "grpo --steps 2 --prompts 1 --group 4 --micro 2 -n 3 --window 1 --lr 0.05"
    program(grpo, "l.safetensors", "--init", t.at("a"))
    t.run("dit", t.at("a"), "--lora", t.at("l.safetensors"), "--dtype", "f32", out=t.at("h"))
    sample = ("-p", "a small red circle moving up on a black background", "-n", "3", "-w")
    program("sample", "0.safetensors", *sample, t.at("a"))
    program("sample", "1.safetensors", *sample, t.at("a"), "--lora", t.at("l.safetensors"))
    program("sample", "2.safetensors", *sample, t.at("h"))
    base, osps, ours = (read_safetensors(t.at(f"{i}.safetensors"))[0]["latent"].array() for i in range(3))
    off, moved = abs(ours - osps).max(), abs(base - osps).max()
    t.check("osp's adapter, merged, draws osp's clip", off <= 1e-3 * moved, f"{off:.1e} of {moved:.1e}")


def test_torch(t):
    """Tiny models of the real classes with random weights: each step against the library's own answer."""
    torch, transformers, diffusers = need("torch", "transformers", "diffusers")
    torch.manual_seed(1)

    @torch.no_grad()
    def scrambled(model, dtype=torch.float32):
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).to(dtype).float())
        return model.eval()

    weights = {n: torch.from_numpy(w) for n, w in tiny_weights().items()}
    os.mkdir(t.at("released"))
    torch.save({"w": torch.ones(2)}, t.at("released", "Wan2.1_VAE.pth"))
    for what, wanted, state in (
            ("weights of bf16", dict(num_full_blocks="4"), {n: w.bfloat16() for n, w in weights.items()}),
            ("weights in a dict", dict(num_full_blocks="4"), {"state_dict": weights, "epoch": 3}),
            ("raw weights and EMA in a file", "save one state_dict", {"model": weights, "ema": weights}),
            ("an object", "more than a state_dict", torch.nn.Linear(2, 2))):
        torch.save(state, t.at("released", "ema_model_state_dict.pt"))
        t.expect(what, wanted, "dit", t.at("released"), *"--heads 2 --layout hybrid --no-hif8".split())
    pairs, adapter = load(t.at("peft"), "adapter_config.json")[0], t.at("rl", "lora-checkpoint-28")
    pairs = {n.replace(".weight", ".default.weight"): torch.from_numpy(x.array()) for n, x in pairs.items()}
    torch.save(pairs, os.path.join(adapter, "adapter_model.bin"))
    pathlib.Path(adapter, "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "bias": "none"}')
    t.run("dit", t.at("Wan's 1"), "--lora", adapter, "--dtype", "f32", out=t.at("again"))
    t.check("RL's adapter_model.bin as peft's", filecmp.cmp(t.at("tuned"), t.at("again"), shallow=False))
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.save_pretrained(t.at("pipe", "tokenizer"))
    encoder = scrambled(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)), torch.bfloat16)
    encoder.save_pretrained(t.at("pipe", "text_encoder"))
    argv = ["text", "a red  fox runs", "--negative", "blurred", "--encoder", t.at("pipe")]
    status, error = t.run(*argv, out=t.at("text"))
    found, ok = read_safetensors(t.at("text"))[0], status == 0
    for name, prompt in ("text_cond", "a red fox runs"), ("text_uncond", "blurred"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        rows, want = found[name].array(), encoder(ids).last_hidden_state[0].detach().numpy()
        ok &= rows.shape == (512, 32) and not rows[len(want):].any()
        ok &= abs(rows[:len(want)] - want).max() < 0.03 * abs(want).max()
    t.check("text: rows of UMT5, zeros after them", ok, error)
    vae = scrambled(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1))
    vae.save_pretrained(t.at("pipe", "vae"))
    noise = torch.randn(16, 3, 4, 6)
    save(t.at("noise"), {"noise": noise.numpy(), "latent": noise.numpy()})
    mean, std = (torch.tensor(vae.config[k]).view(1, 16, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    want = vae.decode(noise[None] / (1 / std) + mean).sample[0].detach().clamp(-1, 1)
    want = ((want + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    with unittest.mock.patch("imageio_ffmpeg.write_frames") as frames:
        t.run("video", t.at("noise"), "--vae", t.at("pipe"), out=t.at("clip.mp4"))
    got = np.float32([list(call.args[0]) for call in frames.return_value.send.call_args_list[1:]])
    t.check("video: frames of Wan's VAE", abs(got.reshape(want.shape) - want).max() < 0.51)
    status, error = t.run("video", t.at("noise"), "--vae", t.at("pipe", "vae"), out=t.at("clip.mp4"))
    t.check("video: MP4", status == 0 and os.path.getsize(t.at("clip.mp4")) > 500, error)
    model = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, text_dim=32,
                                            freq_dim=32, ffn_dim=96, num_layers=4)
    rows = [torch.from_numpy(found[n].array())[None] for n in ("text_cond", "text_uncond")]
    sample = [t.args.osp, "sample", "-w", t.at("dit"), "--text", t.at("text"), "--noise", t.at("noise"),
              "-o", t.at("x.safetensors"), *"--frames 9 --height 32 --width 48 -n 2 -g 3 --shift 3".split()]
    for dtype in torch.float32, torch.bfloat16:
        model, x, src = scrambled(model, dtype), noise[None], t.at(str(dtype))
        copy.deepcopy(model).to(dtype).save_pretrained(src, max_shard_size="200KB")
        for s, s_next in (1, 0.75), (0.75, 0):              # spec §7: two Euler steps, shift 3, guidance 3
            v_cond, v_uncond = (model(x, torch.tensor([1000 * s]), r).sample.detach() for r in rows)
            x = x + (s_next - s) * (v_uncond + 3 * (v_cond - v_uncond))
        status, error = t.run("dit", src, "--dtype", "f32", out=t.at("dit"))
        subprocess.run(sample, check=True, capture_output=True)
        got = read_safetensors(t.at("x.safetensors"))[0]["latent"].array()
        off = np.linalg.norm(got - x[0].numpy()) / np.linalg.norm(x[0] - noise)
        t.check(f"osp sample of a {dtype} model as diffusers", off < 1e-5, f"relative L2 {off:.1e} {error}")


if __name__ == "__main__":
    sys.exit(main())
