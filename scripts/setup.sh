#!/usr/bin/env bash
# Makes .venv with rftjax installed for editing: ./scripts/setup.sh [EXTRA ...]
#
# Extras (see pyproject.toml) add up over calls. A call that has nothing to do starts no Python and takes milliseconds.
# RFTJAX_PYTHON names the interpreter; without it, the newest of Python 3.13, 3.12 and 3.11 on PATH or in pyenv's
# versions folder.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.rftjax-setup"  # line 1: project folder and pyproject's hash; 2: interpreter asked for; 3: extras

hash_of() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# Prints the real path of an interpreter of version $2 that can make environments; fails for broken shims and for
# system Pythons whose venv was split off.
probe() {
  "$1" -c '
import ensurepip, sys, venv
found = "%d.%d" % sys.version_info[:2]
sys.exit(1) if sys.argv[1] != found else print(sys.executable)' "$2" 2>/dev/null
}

find_python() {
  local version candidate
  for version in 3.13 3.12 3.11; do
    while IFS= read -r candidate; do
      if [[ -x "$candidate" ]] && probe "$candidate" "$version"; then return 0; fi
    done < <(
      type -a -P "python$version" || true
      printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python | sort -V -r
      type -a -P python3 python || true
    )
  done
  return 1
}

choose_python() {
  local python version
  if [[ -n "${RFTJAX_PYTHON:-}" ]]; then
    python="$(command -v "$RFTJAX_PYTHON" || true)"
    for version in 3.13 3.12 3.11; do
      if [[ -n "$python" ]] && probe "$python" "$version"; then return 0; fi
    done
    echo "setup: RFTJAX_PYTHON=$RFTJAX_PYTHON is not a working Python 3.11, 3.12 or 3.13 with the venv module" >&2
    return 1
  fi
  if find_python; then return 0; fi
  cat >&2 <<EOF
setup: found no Python 3.13, 3.12 or 3.11 with the venv module, neither on PATH nor in ${PYENV_ROOT:-$HOME/.pyenv}/versions.
Install one (for example: apt install python3.12 python3.12-venv, or: pyenv install 3.13), or name one in RFTJAX_PYTHON.
EOF
  return 1
}

identity="$root $(hash_of "$root/pyproject.toml")"
asked="${RFTJAX_PYTHON:-}"
old_identity="" old_asked="" old_extras=""
if [[ -f "$stamp" && -x "$venv/bin/python" ]]; then
  { read -r old_identity && read -r old_asked && read -r old_extras; } <"$stamp" || true
  # Without a wish, the interpreter in use stays.
  asked="${asked:-$old_asked}"
fi

extras="$old_extras"
for extra in "$@"; do
  if ! grep -q "^$extra = \[" "$root/pyproject.toml"; then
    echo "setup: '$extra' is no extra of pyproject.toml's [project.optional-dependencies]" >&2
    exit 2
  fi
  case " $extras " in *" $extra "*) ;; *) extras="${extras:+$extras }$extra" ;; esac
done
if [[ "$identity $asked $extras" == "$old_identity $old_asked $old_extras" ]]; then exit 0; fi

# Two calls at once would install over each other; pyproject.toml is the lock because it is always there.
if command -v flock >/dev/null; then
  exec 9<"$root/pyproject.toml"
  if ! flock -n 9; then
    echo "setup: another setup is at work; waiting for it" >&2
    flock 9
    exec 9>&-
    exec "${BASH_SOURCE[0]}" "$@"
  fi
fi

if [[ -z "$old_identity" || "${old_identity% *}" != "$root" || "$asked" != "$old_asked" ]]; then
  python="$(choose_python)"
  rm -f "$stamp"
  echo "setup: making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi
echo "setup: installing rftjax${extras:+ with ${extras// /, }} (a few minutes the first time)"
SECONDS=0
cd "$root"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
  --editable ".${extras:+[${extras// /,}]}" || {
  echo "setup: pip failed (above); ./scripts/setup.sh $* tries again" >&2
  exit 1
}
printf '%s\n%s\n%s\n' "$identity" "$asked" "$extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "setup: done in $SECONDS s"
