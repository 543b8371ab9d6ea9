"""Downloads the data of a stream from the Hugging Face hub and unpacks them.

    keeplora fetch recipes/streams/FILE.yaml --data_root /where/the/data/shall/be

The stream's YAML names the data (`hub`). A dropped connection is continued where it stopped. After an
interruption the same command keeps the files that have arrived whole, begins the others anew, and does
nothing where all is there. Archives are kept: without them the next call would download them again. Exit
status: 0, or 1 where files that the stream names are still missing (from other sources, or lying elsewhere in
the repository), 2 where it could not go on.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = OptionParser("keeplora fetch", __doc__)
    parser.add_argument("stream", help="the stream's YAML")
    parser.add_setting("data_root", Path | None, "folder that the data go to, if not the YAML's own", default=None)
    given = parser.read(argv)

    from mllm_keeplora.data.fetch_stream import fetch_stream, format_fetched, left_to_do
    from mllm_keeplora.data.stream import load_stream

    stream = load_stream(Path(given.stream), given.data_root, check_files=False)
    fetched = fetch_stream(stream)
    left = left_to_do(stream)
    print(format_fetched(stream, fetched, left))
    print(f"\nThen check them: keeplora check {given.stream} --data_root {stream.data_root}")
    return 1 if left else 0
