//! What must hold for every text, against oracles that are slow and plain. The tests feed these
//! functions from a seeded generator, the fuzz targets from a fuzzer.

use std::collections::BTreeMap;
use std::sync::Arc;

use fancy_regex::Regex;
use rustbpe_core::{Encoder, Gpt4Split, Merge, Split, TieBreak, Vocab, WordCounts, train};

const NUM_MERGES: usize = 40;

/// GPT-4's pattern with numbers of up to `max_digits`, as nanochat writes it.
pub fn pattern(max_digits: usize) -> String {
    format!(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,{max_digits}}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
}

/// GPT-4's pattern as tiktoken first wrote it.
pub fn first_pattern(max_digits: usize) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{max_digits}}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

pub fn pieces<'a>(splitter: &Gpt4Split, text: &'a str) -> Vec<&'a str> {
    let mut pieces = Vec::new();
    let Ok(()) = splitter.split(text, |start, end| pieces.push(&text[start..end]));
    pieces
}

/// The hand-written splitter cuts as the regular expression does.
pub fn check_split(pattern: &str, regex: &Regex, text: &str) {
    let splitter = Gpt4Split::from_pattern(pattern).expect("a known pattern");
    let found = regex.find_iter(text).map(|found| found.expect("no limit is hit").as_str());
    assert_eq!(pieces(&splitter, text), found.collect::<Vec<_>>(), "{text:?}");
}

/// Merges are those of counting all pairs again after each merge, and encoding is that of searching
/// all pairs again after each merge.
pub fn check_train_and_encode(text: &str) {
    let splitter = Gpt4Split::new(2);
    for tie_break in [TieBreak::RustBpe, TieBreak::HuggingFace] {
        let mut words = WordCounts::new(2);
        let Ok(()) = words.add(&splitter, &[text, text]);
        let merges = train(words, NUM_MERGES, tie_break, |_| Ok::<_, ()>(())).expect("it is short");
        assert_eq!(merges, slow_merges(&pieces(&splitter, text), tie_break), "{text:?}");
        let vocab = Vocab::from_merges(&merges).expect("merges make different tokens");
        check_encode(vocab, text);
    }
}

/// As above for tokens that no training made: each third piece and what ends each fifth.
pub fn check_encode_foreign_tokens(text: &str) {
    let splitter = Gpt4Split::new(2);
    let pieces = pieces(&splitter, text);
    let endings = pieces.iter().step_by(5).map(|piece| &piece.as_bytes()[piece.len() / 3..]);
    let tokens = pieces.iter().step_by(3).map(|piece| piece.as_bytes()).chain(endings);
    let mut ranks: BTreeMap<Vec<u8>, u32> =
        (0..=255).map(|byte| (vec![byte], byte as u32)).collect();
    for token in tokens {
        let rank = ranks.len() as u32;
        ranks.entry(token.to_vec()).or_insert(rank);
    }
    let ranks: Vec<(Vec<u8>, u32)> = ranks.into_iter().collect();
    check_encode(Vocab::from_ranks(&ranks).expect("made so"), text);
}

fn check_encode(vocab: Vocab, text: &str) {
    let encoder = Encoder::new(Arc::new(vocab));
    let splitter = Gpt4Split::new(2);
    let letters: String = text.chars().filter(|char| char.is_alphabetic()).collect();
    let texts = [text, &letters.repeat(5), "", text]; // the second time from the cache
    let slow = texts.map(|text| {
        let pieces = pieces(&splitter, text);
        let ids = pieces.iter().map(|piece| slow_encode(encoder.vocab(), piece.as_bytes()));
        ids.collect::<Vec<_>>().concat()
    });
    let Ok(batch) = encoder.encode_batch(&splitter, &texts, 2);
    let ids: Vec<u32> = batch.iter().flat_map(|block| block.tokens.clone()).collect();
    assert_eq!(ids, slow.concat(), "{text:?}");
    let Ok(one) = encoder.encode(&splitter, text);
    assert_eq!(one, slow[0], "{text:?}");
    assert_eq!(encoder.vocab().decode(&one).expect("they are tokens"), text.as_bytes());
}

/// Counts all pairs again after each merge, and takes the most frequent one.
fn slow_merges(pieces: &[&str], tie_break: TieBreak) -> Vec<Merge> {
    let mut words: Vec<Vec<u32>> =
        pieces.iter().map(|piece| piece.bytes().map(u32::from).collect()).collect();
    let mut merges = Vec::new();
    while merges.len() < NUM_MERGES {
        let mut counts = BTreeMap::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_insert(0) += 1;
        }
        let order = |id: u32| match tie_break {
            TieBreak::HuggingFace if id < 256 => {
                (u32::from(!matches!(id, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)), id)
            }
            _ => (u32::from(id > 255), id),
        };
        let before = |a: Merge, b: Merge| (order(a.0), order(a.1)).cmp(&(order(b.0), order(b.1)));
        let best = counts.iter().max_by(|a, b| a.1.cmp(b.1).then(before(*b.0, *a.0)));
        let Some((&merge, _)) = best else {
            break;
        };
        let merged = 256 + merges.len() as u32;
        merges.push(merge);
        for word in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if (word[at], word[at + 1]) == merge {
                    word.splice(at..at + 2, [merged]);
                }
                at += 1;
            }
        }
    }
    merges
}

/// Merges the lowest rank of all neighbours, the leftmost if it occurs twice, until there is none.
fn slow_encode(vocab: &Vocab, piece: &[u8]) -> Vec<u32> {
    if let Some(rank) = vocab.rank(piece) {
        return vec![rank];
    }
    let mut bounds: Vec<usize> = (0..=piece.len()).collect();
    loop {
        let ranks = bounds.windows(3).enumerate().filter_map(|(i, bound)| {
            let rank = vocab.rank(&piece[bound[0]..bound[2]]);
            rank.map(|rank| (rank, i))
        });
        let Some((_, i)) = ranks.min() else {
            break;
        };
        bounds.remove(i + 1);
    }
    let parts = bounds.windows(2).map(|bound| vocab.rank(&piece[bound[0]..bound[1]]));
    parts.map(|rank| rank.expect("each part is a token")).collect()
}
