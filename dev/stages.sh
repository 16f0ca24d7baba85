# shellcheck shell=bash
# The stages of a whole run, each done once; sourced by runcpu.sh, speedrun.sh and run1000.sh.
#
# A run is a folder of config files, one for each script: configs/speedrun/base_train.py. A stage
# without a file there is left out, and so is one that --skip=STAGE names, until --with=STAGE takes it
# back in. What has finished is not done again, an interrupted training continues where it stopped,
# and whatever was trained from a model that changes is removed first. Needs `name`, the script's own
# name, for its messages. The stages and their order come from nanochat/stages.py.

usage() {
    echo "usage: bash $name [CONFIG_FOLDER] [--skip=STAGE | --with=STAGE]..." >&2
    echo "$name: $1" >&2
    exit 2
}

# begin DEFAULT_FOLDER ARGUMENT...: reads the arguments and says where everything will lie.
begin() {
    folder=$1
    skipped=" "
    shift
    for argument; do
        case $argument in
            --skip=*) skipped+="${argument#--skip=} " ;;
            --with=*) skipped=${skipped// ${argument#--with=} / } ;;
            -*) usage "there is no $argument" ;;
            *) folder=$argument ;;
        esac
    done
    [ -f "$folder/base_train.py" ] || usage "'$folder' has no base_train.py"
    tag=$(basename "$folder")
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
    marks="$NANOCHAT_BASE_DIR/runs/$tag"
    mkdir -p "$marks"
    changed=false
    parent=""
    parent_folder=""
    trap 'echo "$name: stopped; run it again to continue" >&2; exit 130' INT TERM
}

left_out() {
    [[ $skipped == *" $1 "* ]]
}

# is_done STAGE OUTPUT: it finished, its output is there, and nothing before it has just changed.
is_done() {
    [ "$changed" = false ] && [ -f "$marks/$1" ] && [ -e "$NANOCHAT_BASE_DIR/$2" ]
}

# once STAGE OUTPUT COMMAND...: OUTPUT lies below the base directory.
once() {
    local stage=$1 output=$2
    shift 2
    if left_out "$stage"; then
        printf '\n== %s: left out\n' "$stage"
    elif is_done "$stage" "$output"; then
        printf '\n== %s: done before (%s)\n' "$stage" "$NANOCHAT_BASE_DIR/$output"
    else
        printf '\n== %s: %s\n' "$stage" "$*"
        rm -f "$marks/$stage"
        changed=true
        "$@"
        touch "$marks/$stage"
    fi
}

# look STAGE OUTPUT COMMAND...: once, and what follows does not depend on it.
look() {
    local before=$changed
    once "$@"
    changed=$before
}

# on_gpus SCRIPT ARGUMENT...: by torchrun where there are several processes to run.
on_gpus() {
    local script=$1
    shift
    if [ "${NPROC_PER_NODE:-1}" = 1 ]; then
        python -m "scripts.$script" "$@"
    else
        torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m "scripts.$script" "$@"
    fi
}

# forget_models_after STAGE: removes what was trained from its model.
forget_models_after() {
    local model models later=false
    [ "$1" != tokenizer ] || later=true
    while read -r model _ models _; do
        if [ "$later" = true ] && [ -e "$NANOCHAT_BASE_DIR/$models/$tag" ]; then
            echo "$name: removing $models/$tag: what it was trained from changes"
            rm -r "${NANOCHAT_BASE_DIR:?}/$models/$tag"
        fi
        [ "$model" != "$1" ] || later=true
    done <<<"$stages"
}

# own_tokenizer: sets `tokenizer`, the run's folder below the base directory, and the flag that names
# it to the scripts. Where the usual folder is another run's, which needs it, this run has its own.
own_tokenizer() {
    tokenizer=tokenizer
    tokenizer_flag=()
    [ -f "$folder/tok_train.py" ] || return 0
    if [ -e "$NANOCHAT_BASE_DIR/tokenizer/tokenizer_ranks.json" ] &&
        [ "$(cat "$NANOCHAT_BASE_DIR/tokenizer/run" 2>/dev/null)" != "$tag" ]
    then
        tokenizer="tokenizers/$tag"
        tokenizer_flag=("--tokenizer_dir=$NANOCHAT_BASE_DIR/$tokenizer")
        echo "$name: the tokenizer of the run $tag is in $NANOCHAT_BASE_DIR/$tokenizer"
    fi
    mkdir -p "$NANOCHAT_BASE_DIR/$tokenizer"
    echo "$tag" >"$NANOCHAT_BASE_DIR/$tokenizer/run"
}

# evaluate STAGE SCRIPT CHECKPOINT
evaluate() {
    if [ -f "$folder/$2.py" ]; then
        look "$1" "$3" on_gpus "$2" "$folder/$2.py" --checkpoint="$3" \
            ${tokenizer_flag[@]+"${tokenizer_flag[@]}"}
    fi
}

# train MODEL SCRIPT FOLDER PARENT_FLAG SOURCE_FLAG CHAT_EVALUATION EVALUATIONS, a row of
# `python -m nanochat.stages`: a stage that leaves a model, then the model's evaluations.
train() {
    local model=$1 script=$2 models=$3 parent_flag=$4 source_flag=$5 chat_evaluation=$6
    local output="$models/$tag/latest.pt" arguments=() evaluation
    if [ -z "$parent" ]; then  # the first stage, even if it is left out
        parent=$model
        parent_folder=$models
    fi
    if [ ! -f "$folder/$script.py" ] || left_out "$script"; then
        printf '\n== %s: left out\n' "$script"
        return
    fi
    [ "$source_flag" = - ] || arguments+=("--$source_flag=$parent")
    [ "$parent_flag" = - ] || arguments+=("--$parent_flag=$parent_folder/$tag/latest.pt")
    is_done "$script" "$output" || forget_models_after "$model"
    once "$script" "$output" \
        on_gpus "$script" "$folder/$script.py" ${arguments[@]+"${arguments[@]}"} \
        ${tokenizer_flag[@]+"${tokenizer_flag[@]}"} --model_tag="$tag" --resume
    parent=$model
    parent_folder=$models
    for evaluation in ${7//,/ }; do
        [ "$evaluation" = - ] || evaluate "$evaluation" "$evaluation" "$output"
    done
    evaluate "$chat_evaluation" chat_eval "$output"
}

# train_and_evaluate: every stage after the data.
train_and_evaluate() {
    local stages row tokenizer tokenizer_flag
    stages=$(python -m nanochat.stages)
    own_tokenizer
    if [ -f "$folder/tok_train.py" ]; then
        if ! is_done tok_train "$tokenizer/tokenizer_ranks.json"; then
            forget_models_after tokenizer
        fi
        once tok_train "$tokenizer/tokenizer_ranks.json" \
            python -m scripts.tok_train "$folder/tok_train.py" \
            --output_dir="$NANOCHAT_BASE_DIR/$tokenizer"
    fi
    if [ -f "$folder/tok_eval.py" ]; then
        look tok_eval "$tokenizer/tokenizer_ranks.json" \
            python -m scripts.tok_eval "$folder/tok_eval.py" \
            ${tokenizer_flag[@]+"${tokenizer_flag[@]}"}
    fi
    while read -r -u 3 row; do  # the stages themselves keep standard input
        # shellcheck disable=SC2086  # a row is words
        train $row
    done 3<<<"$stages"
    python -m nanochat.report generate
    if [ -f "$folder/chat_cli.py" ]; then
        printf '\n== one answer\n'
        python -m scripts.chat_cli "$folder/chat_cli.py" \
            --checkpoint="$parent_folder/$tag/latest.pt" \
            ${tokenizer_flag[@]+"${tokenizer_flag[@]}"}
    fi
    printf '\n%s: finished; the report is %s\n' "$name" "$NANOCHAT_BASE_DIR/report/report.md"
    printf 'talk to it: python -m scripts.chat_web --checkpoint=%s %s\n' \
        "$parent_folder/$tag/latest.pt" "${tokenizer_flag[*]-}"
}
