# What can stand at the cursor. bash breaks words at = and :, so the word is taken from the line, and of each answer
# only what follows the last break is handed back; in quotes, and in zsh, nothing is broken.
_ggscope() {
  local command=${COMP_WORDS[1]} previous=${COMP_WORDS[COMP_CWORD-1]} line=${COMP_LINE:0:$COMP_POINT}
  local words="" files="" lead="" breaks="" cut="" found reply
  local cur=${line##*[[:space:]]}
  case $COMP_WORDBREAKS in *=*) breaks="=" ;; esac
  case $COMP_WORDBREAKS in *:*) breaks="$breaks:" ;; esac
  case $cur in \'*|\"*) cur=${cur#?}; breaks="" ;; esac
  if [ -n "$breaks" ]; then cut=${cur%"${cur##*[$breaks]}"}; fi
  local part=$cur
  if [ "$COMP_CWORD" -eq 1 ]; then
    words=$_ggscope_commands
  else
    case $previous:$cur in
      --config-dir:*|--*-file:*) files=1 ;;
      *:*=*)
        part=${cur#*=}
        part=${part##*[\[,]}
        lead=${cur%"$part"}
        _ggscope_values "$command" "${cur%%=*}" ;;
      *) _ggscope_words "$command" "$COMP_CWORD" "$previous" ;;
    esac
  fi
  COMPREPLY=()
  while IFS= read -r reply; do
    if [ -n "$reply" ]; then reply=$lead$reply; COMPREPLY+=("${reply#"$cut"}"); fi
  done <<< "$(compgen -W "$words" -- "$part")"
  if [ -n "$files" ]; then
    found=${#COMPREPLY[@]}
    while IFS= read -r reply; do
      if [ -n "$reply" ]; then reply=$lead$reply; COMPREPLY+=("${reply#"$cut"}"); fi
    done <<< "$(compgen -f -- "$part")"
  fi
  if ! type compopt > /dev/null 2>&1; then return; fi
  case ${COMPREPLY[0]}:$lead in
    *=:*|*:*\[) compopt -o nospace ;;
    *) if [ "$found" = 0 ]; then compopt -o filenames; fi ;;
  esac
}
