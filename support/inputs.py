"""What a training is made from, told by its contents: the base's parts and every pair, before the first step."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from torch import nn
from tqdm import tqdm

from support.batches import EncodedPairs
from support.detect import warn_if_inverted
from support.devices import usable_cpus
from support.errors import UserError, warn_if_cut
from support.files import read_json, save_json
from support.listing import refuse_broken
from support.run import Run


def open_inputs(run: Run, sd, controlnet, pairs, held_out) -> EncodedPairs:
    """Look at the base, the ControlNet to start from if there is one, and all pairs; refuse others than at first."""
    networks = {"UNet": sd.unet, "VAE": sd.vae, "text encoder": sd.text_encoder}
    checksums = {f"base's {name}": checksum_of(network) for name, network in networks.items()}
    checksums["base's tokenizer"] = digest(json.dumps(sd.tokenizer.tokens).encode())
    checksums["ControlNet that it starts from"] = checksum_of(controlnet) if controlnet else "none"
    both = [(some, i) for some in (pairs, held_out) for i in range(len(some))]
    contents = look_at(both, record=run.folder / "cache" / "pictures.json")
    if run.writes:
        inputs = [(f"the {name}", checksum) for name, checksum in checksums.items()]
        for (some, i), content in zip(both, contents):
            inputs.append((some.name(i), digest(json.dumps([some.prompts[i], content]).encode())[:16]))
        remember(run.folder / "inputs.json", inputs, run.checkpoint is not None)
        warn_if_cut(sd.tokenizer, {pairs.name(i): prompt for i, prompt in enumerate(pairs.prompts)})
        warn_if_inverted(pairs.name(0), pairs.hint(0))
    precision = "bf16" if run.args.mixed_precision == "bf16" else "float32"  # in fp16 the VAE can overflow
    vae = checksums["base's VAE"]
    encoder, own = f"{vae} {pairs.resolution} {precision}", contents[: len(pairs)]
    return EncodedPairs(pairs, own, run.folder / "cache" / "moments", encoder, sd.vae.config.latent_channels)


def checksum_of(network: nn.Module) -> str:
    return digest(*(tensor.cpu().contiguous().numpy() for tensor in network.state_dict().values()))


def digest(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def look_at(pairs: list[tuple], record: Path) -> list[str]:
    """The contents of pairs, each (set of pairs, index). Raises UserError that shows the broken ones.

    Their files are opened, but for those that `record` knows from another time, by path, size and date. Of several
    processes one looks, the others then find the record.
    """
    with FileLock(record.with_suffix(".lock")):
        known = read_json(record, "delete it") if record.exists() else {}
        stamps = [stamp(*some.files(i)) for some, i in pairs]
        new = {stamp: pair for stamp, pair in zip(stamps, pairs) if stamp and stamp not in known}
        broken = []
        with ThreadPoolExecutor(usable_cpus()) as pool:
            contents = {key: pool.submit(some.content, i) for key, (some, i) in new.items()}
            for key, content in tqdm(contents.items(), "looking at the pairs", disable=not new):
                try:
                    known[key] = content.result()
                except UserError as error:
                    broken.append(str(error))
        if known:
            save_json(known, record)
    refuse_broken(broken, len(set(stamps)), "the pairs")
    return [known.get(stamp) or some.content(i) for stamp, (some, i) in zip(stamps, pairs)]


def stamp(*files: Path) -> str:
    """What tells without opening them that files are still the same; "" of no files."""
    return " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def remember(record: Path, inputs: list[tuple[str, str]], resumed: bool) -> None:
    """Write down the checksums of all that a run is made from; going on with anything else is refused by its name."""
    checksums = [checksum for _, checksum in inputs]
    if resumed and record.exists():
        known = read_json(record, "delete it, and these are taken for the same")["inputs"]
        if known != checksums:
            changed = (name for (name, checksum), before in zip(inputs, known) if checksum != before)
            raise UserError(f"{next(changed, 'the number of pairs')} is not what {record.parent} was trained with: "
                            "restore it, or start another --output-dir")  # fmt: skip
    save_json({"inputs": checksums}, record)
