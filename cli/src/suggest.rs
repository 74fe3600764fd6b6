//! "Did you mean": what is nearest to a text that was not found.

/// The candidates nearest to `text`, nearest first, at most [`SUGGESTIONS_MAX`]; none if all are
/// far off.
pub(crate) fn nearest<'a>(
    text: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Vec<&'a str> {
    let text = text.to_ascii_lowercase();
    let far = text.chars().count().div_ceil(3).max(2);
    let mut near: Vec<(usize, &str)> = candidates
        .into_iter()
        .map(|candidate| (distance(&text, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= far)
        .collect();
    near.sort_unstable();
    near.into_iter().map(|(_, candidate)| candidate).take(SUGGESTIONS_MAX).collect()
}

/// Levenshtein's: how many characters to add, drop or change. The texts are a person's, short.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, in_a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, in_b) in b.iter().enumerate() {
            let changed = diagonal + usize::from(in_a != *in_b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

const SUGGESTIONS_MAX: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_comes_first_and_the_far_not_at_all() {
        let codes = ["SFT-ID-001", "SFT-ID-011", "SFT-TLS-001", "SFT-STO-001"];
        assert_eq!(nearest("sft-id-01", codes)[0], "SFT-ID-001");
        assert_eq!(nearest("SFT-TLS-01", codes)[0], "SFT-TLS-001");
        assert!(nearest("hello world", codes).is_empty());
    }

    #[test]
    fn distance_counts_edits() {
        for (a, b, edits) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3)] {
            assert_eq!((distance(a, b), distance(b, a)), (edits, edits));
        }
    }
}
