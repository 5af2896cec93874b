import random, sys, tempfile, shutil
from pathlib import Path
from tests.command import kill_and_resume as k
k.warm(); other=tempfile.mkdtemp(dir="/dev/shm"); folder=Path(tempfile.mkdtemp()); draw=random.Random(1)
try:
  for r in sys.argv[1:] or k.RECIPES:
    s=k.Setting(r,1,2)
    try:
        ref,rows=k.uninterrupted(folder/"a"/r,s,other)
        out,ends=k.killed(folder/"b"/r,s,other,draw,rows,"kill")
        print(r,ends,len(ref),k.compare(ref,out)[:3],flush=True)
    except k.Failed as e: print(r,str(e)[-900:],flush=True)
finally: shutil.rmtree(other)
