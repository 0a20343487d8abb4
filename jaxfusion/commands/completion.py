"""Prints a script that completes commands, flags and names of configs: `completion SHELL`.

    bash: echo 'source <(jaxfusion completion bash)' >> ~/.bashrc
    zsh:  echo 'source <(jaxfusion completion zsh)' >> ~/.zshrc      # after compinit
    fish: jaxfusion completion fish > ~/.config/fish/completions/jaxfusion.fish
"""

from importlib import import_module

from absl import flags

from jaxfusion.cli import run_main
from jaxfusion.commands.configs import names
from jaxfusion.commands.main import COMMANDS
from jaxfusion.errors import InputError, choose

BASH = """\
_jaxfusion() {
    local word=${COMP_WORDS[COMP_CWORD]} flag=${COMP_WORDS[COMP_CWORD-1]} words=
    [[ $word == = ]] && word=  # bash takes --config=NAME as three words
    [[ $flag == = ]] && flag=${COMP_WORDS[COMP_CWORD-2]}
    if [[ $COMP_CWORD == 1 ]]; then words='COMMANDS'
    elif [[ $flag == --config ]]; then words='CONFIGS'
    else case ${COMP_WORDS[1]} in
CASES
    esac; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o bashdefault -o default -F _jaxfusion jaxfusion"""
ZSH = """\
#compdef jaxfusion
_jaxfusion() {
    local found=
    if (( CURRENT == 2 )); then found='COMMANDS'
    elif [[ $words[CURRENT-1] == --config ]] || compset -P '--config='; then found='CONFIGS'; _files
    else case $words[2] in
CASES
    esac; fi
    compadd -- ${=found} || _files
}
compdef _jaxfusion jaxfusion"""
SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """What a shell reads to complete `jaxfusion`."""
    # Importing a command defines its flags and loads no more than that.
    own = {name: getattr(import_module(f"jaxfusion.commands.{name}"), "FLAGS", {})
           for name in COMMANDS}
    if shell == "fish":
        return "\n".join(_fish(own))
    variable = {"bash": "words", "zsh": "found"}[shell]
    cases = [f"    {name}) {variable}='{' '.join(f'--{flag}' for flag in found)}' ;;"
             for name, found in own.items() if found]
    cases.append(f"    completion) {variable}='{' '.join(SHELLS)}' ;;")
    filled = {"COMMANDS": " ".join(COMMANDS), "CONFIGS": " ".join(names()),
              "CASES": "\n".join(cases)}
    text = {"bash": BASH, "zsh": ZSH}[shell]
    for name, value in filled.items():
        text = text.replace(name, value)
    return text


def _fish(own: dict[str, flags.FlagValues | dict]) -> list[str]:
    def line(when: str, rest: str, about: str = "") -> str:
        about = about.replace("'", "\\'")
        return f"complete -c jaxfusion -n '{when}' {rest}" + (f" -d '{about}'" if about else "")

    lines = [line("__fish_use_subcommand", f"-f -a {name}", about)
             for name, about in COMMANDS.items()]
    for name, found in own.items():
        for flag in found:
            values = f" -a '{' '.join(names())}'" if flag == "config" else ""
            takes = "" if found[flag].boolean else " -r"
            lines.append(line(f"__fish_seen_subcommand_from {name}", f"-l {flag}{takes}{values}",
                              found[flag].help))
    return [*lines, line("__fish_seen_subcommand_from completion", f"-f -a '{' '.join(SHELLS)}'")]


def main(argv: list[str]) -> None:
    """Prints the script."""
    if len(argv) != 2:
        raise InputError(f"completion takes one word, a shell: {', '.join(SHELLS)}")
    print(script(choose("shell", argv[1], SHELLS)))


def run() -> None:
    """The command `jaxfusion completion`."""
    run_main(main, __doc__)
