# Completion of wandb-restore for bash. Needs nothing of the package bash-completion.
# shellcheck shell=bash

_wandb_restore() {
  local word=${COMP_WORDS[COMP_CWORD]} previous=
  [ "$COMP_CWORD" = 0 ] || previous=${COMP_WORDS[COMP_CWORD - 1]}
  COMPREPLY=()
  case $previous in
    --root)
      compopt -o filenames 2> /dev/null
      mapfile -t COMPREPLY < <(compgen -d -- "$word")
      return
      ;;
    --run-path | --exclude | --wait | --connections | --timeout) return ;;
  esac
  [[ $word == -* ]] || return # names are those of the run's files, which only the service knows
  mapfile -t COMPREPLY < <(compgen -W '--run-path --replace --refresh --root --exclude --newest --wait --dry-run --list --json
    --connections --timeout --show-settings --quiet --no-progress --version --help' -- "$word")
}

complete -F _wandb_restore wandb-restore
