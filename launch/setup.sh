# Sourced by the scripts beside it: setup_venv EXTRA makes .venv and installs the project, unless that was done.
# Sets root, bin (of .venv) and num_ranks (GPUs of this machine, or 2). PYTHON names another interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$root/.venv/bin

setup_venv() { # $1: an extra of pyproject.toml, or nothing
  local stamp=$root/.venv/installed-${1:-base}
  # The stamp comes last, so an interrupted set-up is taken up again; it holds what was installed.
  local wanted; wanted=$(cksum < "$root/pyproject.toml")
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "setting up $root/.venv (once; a few minutes)" >&2
  "$bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear "$root/.venv"
  "$bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${1:+[$1]}"
  echo "$wanted" > "$stamp"
}

count_ranks() {
  num_ranks=${NPROC_PER_NODE:-}
  [ -n "$num_ranks" ] && return
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    num_ranks=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true)
  else
    num_ranks=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  fi
  [ "$num_ranks" -gt 0 ] || num_ranks=2
}

needed_extra() { # $@: overrides of a job
  local extras=()
  case " $* " in *" model=timm "* | *" model=hf "* | *" model=llama "* | *" model=bert "* | *recipe=llama_* | *recipe=bert_*)
    extras+=(models) ;; esac
  case " $* " in *onnx* | *recipe=resnet_ptq* | *recipe=resnet_qat* | *recipe=resnet_fusion*) extras+=(onnx) ;; esac
  case " $* " in *" backend=deepspeed "* | *" backend.name=deepspeed "*) extras+=(deepspeed) ;; esac
  (IFS=,; echo "${extras[*]:-}")
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own choice, without its warning
