import os
import subprocess
import sys


def test_the_bars_of_the_libraries_are_off():
    code = "from falign.cli.foreign_output import quiet; quiet(); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
