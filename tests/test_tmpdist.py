from tests.test_distributed import *
from tests.test_distributed import parts
import shutil
def test_x(parts, tmp_path):
    def words(folder, count, images=8, save=2): return arguments(parts, folder / "run", 2//count, images, save_every=save)
    s = state_of(trained(tmp_path/"a", words(tmp_path/"a", 1), 1), 8)
    six = state_of(tmp_path/"a"/"run", 6)
    for name, st in (("8", s), ("6", six)):
        w = {k.removeprefix("weight/"): v for k, v in st.items() if k.startswith("weight/generator")}
        a = {k.removeprefix("average/"): v for k, v in st.items() if k.startswith("average/generator")}
        print("RES weight==average", name, all(torch.equal(w[k], a[k]) for k in a))
