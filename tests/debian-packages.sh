#!/bin/sh
# What the tests of the service and the report run beside Python: installed from Debian's packages where it is
# missing, this is root and there is apt-get. What cannot be had fails nothing here: its tests are skipped.
policy=/usr/sbin/policy-rc.d

missing() {
  path="$PATH:$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')"  # Debian keeps the server's programs out of PATH
  for pair in postgres:postgresql redis-server:redis-server promtool:prometheus chromium:chromium curl:curl; do
    PATH="$path" command -v "${pair%:*}" >/dev/null || printf ' %s' "${pair#*:}"
  done
}

get() {
  said="$(apt-get "$@" -q -y --no-install-recommends -o Acquire::Retries=2 -o DPkg::Lock::Timeout=300 2>&1)" || {
    printf '%s\n' "$said" | tail -n 5
    return 1
  }
}

packages="$(missing)"
if [ -n "$packages" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing for the tests:$packages"
  if [ ! -e "$policy" ]; then  # no service is started: the tests start their own, on ports of their own
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  get update
  for package in $packages; do get install "$package"; done
  packages="$(missing)"
fi
if [ -n "$packages" ]; then
  echo "their tests are skipped; install as root, on Debian with apt-get install:$packages"
fi
exit 0
