#!/bin/bash -eu
# An executable for each target. They are not packed into one file, as libraries of this size do not stand that: the
# package lies in $OUT with what it needs.
MAGNET_FAST_CUDA=0 pip3 install --target "$OUT/packages" ".[test]" atheris
cp -r tests "$OUT/tests"
for target in $(PYTHONPATH="$OUT/packages:." python3 -c 'from tests.fuzz import TARGETS; print(*TARGETS)'); do
  [ "$target" = annotations ] && continue # many at once, in processes of their own
  cat > "$OUT/fuzz_$target" <<END
#!/bin/sh
# LLVMFuzzerTestOneInput: by this line the service knows a fuzz target.
here=\$(dirname "\$(readlink -f "\$0")")
PYTHONPATH="\$here/packages:\$here" OMP_NUM_THREADS=1 exec python3 "\$here/tests/fuzz/atheris_entry.py" $target "\$@"
END
  chmod +x "$OUT/fuzz_$target"
done
