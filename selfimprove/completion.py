"""Completion scripts: the commands, and after `run` and `plan` every installed ``group=option``."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BASH = """_selfimprove() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" word
    word="${{line##* }}"
    if [ "$COMP_CWORD" -le 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
        run|plan) COMPREPLY=($(compgen -W "{words}" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
    # bash breaks words at "=", so only what follows the last one is inserted
    case "$COMP_WORDBREAKS:$word" in *=*:*=*) COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}") ;; esac
}}
complete -o nospace -F _selfimprove selfimprove
"""

_ZSH = """_selfimprove() {{
    if (( CURRENT == 2 )); then compadd -- {commands}; return; fi
    case $words[2] in
        run|plan) compadd -- {words} ;;
        *) _files ;;
    esac
}}
compdef _selfimprove selfimprove
"""

_FISH = """complete -c selfimprove -n __fish_use_subcommand -f -a "{commands}"
complete -c selfimprove -n "__fish_seen_subcommand_from run plan" -f -a "{words}"
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str, commands: Sequence[str], words: Sequence[str]) -> str:
    """The script for a shell, to be evaluated in its start file. Names that a shell could misread are left out."""
    safe = [w for w in words if re.fullmatch(r"[\w./=-]+", w, re.ASCII)]
    return _SCRIPTS[shell].format(commands=" ".join(commands), words=" ".join(safe))
