//! Splitting, training and encoding of a generated text of 4 MB.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rustbpe_core::{Encoder, Gpt4Split, Split, TieBreak, Vocab, WordCounts, train};

const TEXT_BYTES: usize = 4 << 20;
const DISTINCT_WORDS: u64 = 1 << 16;
const NUM_MERGES: usize = 8192;

/// Words of two to eleven letters, short ones and those of small numbers most often.
fn text() -> String {
    let mut text = String::new();
    let mut state = 1_u64;
    while text.len() < TEXT_BYTES {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (state >> 40) as f64 / (1_u64 << 24) as f64;
        let mut number = (DISTINCT_WORDS as f64).powf(uniform) as u64; // Zipf's law
        number = number * 0x9E37 % 0xFFF1;
        for _ in 0..2 + number % 10 {
            text.push(char::from(b'a' + (number % 26) as u8));
            number = number / 3 + 7;
        }
        text.push_str(if number.is_multiple_of(13) { ", " } else { " " });
    }
    text
}

fn counted(splitter: &Gpt4Split, text: &str) -> WordCounts {
    let mut words = WordCounts::new(1);
    let Ok(()) = words.add(splitter, &[text]);
    words
}

fn learn(words: WordCounts) -> Vocab {
    let merges = train(words, NUM_MERGES, TieBreak::RustBpe, |_| Ok::<_, ()>(()));
    Vocab::from_merges(&merges.expect("nothing stops it")).expect("merges make a vocabulary")
}

fn benchmarks(criterion: &mut Criterion) {
    let splitter = Gpt4Split::new(2);
    let text = text();
    let mut group = criterion.benchmark_group("tokenizer");
    group.throughput(Throughput::Bytes(text.len() as u64)).sample_size(20);
    group.bench_function("split", |bencher| {
        bencher.iter(|| {
            let mut num_pieces = 0;
            let Ok(()) = splitter.split(black_box(&text), |_, _| num_pieces += 1);
            num_pieces
        });
    });
    group.bench_function("count", |bencher| bencher.iter(|| counted(&splitter, black_box(&text))));
    group.bench_function("merge", |bencher| {
        bencher.iter_batched(|| counted(&splitter, &text), learn, BatchSize::LargeInput);
    });
    let encoder = Encoder::new(Arc::new(learn(counted(&splitter, &text))));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| encoder.encode(&splitter, black_box(&text)));
    });
    let letters = "a".repeat(50_000);
    group.throughput(Throughput::Bytes(letters.len() as u64));
    group.bench_function("encode one piece of 50,000 letters", |bencher| {
        bencher.iter(|| encoder.encode(&splitter, black_box(&letters)));
    });
}

criterion_group!(all, benchmarks);
criterion_main!(all);
