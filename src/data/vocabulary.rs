//! Text to token ids and back.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The id of padding, in every [`Vocabulary`].
pub const PAD: u32 = 0;
/// The id of a token that the vocabulary does not hold, in every [`Vocabulary`].
pub const UNK: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Chars,
    Words,
}

impl Kind {
    /// The texts of `PAD` and `UNK`.
    fn reserved(self) -> [&'static str; 2] {
        match self {
            Self::Chars => ["", "\u{FFFD}"],
            Self::Words => ["", "<unk>"],
        }
    }
}

/// The tokens that a model knows, characters or words, numbered from 0: [`PAD`], [`UNK`], then the tokens of a text.
///
/// The text of `PAD` is empty; that of `UNK` is U+FFFD for characters and `<unk>` for words, and a text that already
/// contains it encodes it as `UNK`.
///
/// ```
/// use gatefold::data::{UNK, Vocabulary};
/// let vocabulary = Vocabulary::words("the cat and the dog", 1);
/// let ids = vocabulary.encode("the dog barks");
/// assert_eq!(ids, [2, 5, UNK]);
/// assert_eq!(vocabulary.decode(&ids)?, "the dog <unk>");
/// # Ok::<(), gatefold::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Saved")]
pub struct Vocabulary {
    kind: Kind,
    tokens: Vec<String>,
    #[serde(skip)]
    ids: HashMap<String, u32>,
}

/// A vocabulary as it was read, before it is checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    kind: Kind,
    tokens: Vec<String>,
}

impl Vocabulary {
    /// The characters (Unicode scalar values) of `text`, in the order of their code points.
    pub fn chars(text: &str) -> Self {
        let tokens: BTreeSet<char> = text.chars().collect();
        Self::with_reserved(Kind::Chars, tokens.into_iter().map(String::from))
    }

    /// The words of `text`, separated by white space, that occur at least `min_count` times: the most frequent first,
    /// equally frequent ones in the order of their text.
    pub fn words(text: &str, min_count: usize) -> Self {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for word in text.split_whitespace() {
            *counts.entry(word).or_default() += 1;
        }
        let mut words: Vec<(&str, usize)> = counts.into_iter().filter(|&(_, count)| count >= min_count).collect();
        words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        Self::with_reserved(Kind::Words, words.into_iter().map(|(word, _)| word.to_string()))
    }

    fn with_reserved(kind: Kind, tokens: impl Iterator<Item = String>) -> Self {
        let reserved = kind.reserved();
        let tokens = tokens.filter(|token| !reserved.contains(&token.as_str()));
        Self::numbered(kind, reserved.map(String::from).into_iter().chain(tokens).collect())
    }

    fn numbered(kind: Kind, tokens: Vec<String>) -> Self {
        let ids = tokens.iter().cloned().zip(0..).collect();
        Self { kind, tokens, ids }
    }

    /// The ids of the characters or words of `text`; [`UNK`] for those that the vocabulary does not hold.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let id = |token: &str| self.id(token).unwrap_or(UNK);
        match self.kind {
            Kind::Chars => text.chars().map(|char| id(char.encode_utf8(&mut [0; 4]))).collect(),
            Kind::Words => text.split_whitespace().map(id).collect(),
        }
    }

    /// The text of `ids`, words joined by one space. [`PAD`] gives nothing, [`UNK`] its text.
    ///
    /// # Errors
    /// `Argument` if an id is not below [`len`](Self::len).
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut text = String::new();
        for &id in ids {
            let expected = || format!("less than {}, the length of the vocabulary", self.len());
            let token = self.token(id).ok_or_else(|| Error::argument("Vocabulary.decode", "an id", id, expected()))?;
            if self.kind == Kind::Words && id != PAD && !text.is_empty() {
                text.push(' ');
            }
            text.push_str(token);
        }
        Ok(text)
    }

    /// The number of ids, [`PAD`] and [`UNK`] included: the rows that an embedding needs.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token besides [`PAD`] and [`UNK`].
    pub fn is_empty(&self) -> bool {
        self.tokens.len() == self.kind.reserved().len()
    }

    /// The text of token `id`, if there is such a token.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    /// The id of `token`, if the vocabulary holds it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The vocabulary as JSON: `{"kind": "chars" or "words", "tokens": [..]}`, a token's place being its id.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// A vocabulary from what [`to_json`](Self::to_json) gave.
    ///
    /// # Errors
    /// `Format` if `json` is not such text: unknown kind or field, wrong first two tokens, a token that is not one
    /// character or word, or one that stands there twice.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).map_err(|error| Error::format("Vocabulary.from_json", &error).with_source(error))
    }
}

impl TryFrom<Saved> for Vocabulary {
    type Error = String;

    fn try_from(Saved { kind, tokens }: Saved) -> std::result::Result<Self, String> {
        let Some(([pad, unk], others)) = tokens.split_first_chunk() else {
            return Err(format!("tokens has shape [{}], expected at least [2]", tokens.len()));
        };
        if [pad, unk] != kind.reserved() {
            return Err(format!("the first tokens are {:?}, expected {:?}", [pad, unk], kind.reserved()));
        }
        for token in others {
            let (whole, expected) = match kind {
                Kind::Chars => (token.chars().count() == 1, "one character"),
                Kind::Words => (token.split_whitespace().eq([token.as_str()]), "one word"),
            };
            if !whole {
                return Err(format!("a token is {token:?}, expected {expected}"));
            }
        }
        let vocabulary = Self::numbered(kind, tokens);
        // A later duplicate has taken the id of an earlier one.
        match vocabulary.tokens.iter().zip(0..).find(|&(token, id)| vocabulary.id(token) != Some(id)) {
            Some((token, _)) => Err(format!("token {token:?} stands there more than once, expected once")),
            None => Ok(vocabulary),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn tokens(vocabulary: &Vocabulary) -> Vec<&str> {
        vocabulary.tokens.iter().map(String::as_str).collect()
    }

    #[test]
    fn ids_are_deterministic() {
        let text = "b a\u{FFFD} b <unk> c\tc\n c é <unk>";
        let cases: [(Vocabulary, &[&str]); 5] = [
            (Vocabulary::chars("bañb\u{FFFD} a\n"), &["", "\u{FFFD}", "\n", " ", "a", "b", "ñ"]),
            (Vocabulary::words(text, 1), &["", "<unk>", "c", "b", "a\u{FFFD}", "é"]),
            (Vocabulary::words(text, 2), &["", "<unk>", "c", "b"]),
            (Vocabulary::words(text, 9), &["", "<unk>"]),
            (Vocabulary::chars(""), &["", "\u{FFFD}"]),
        ];
        for (vocabulary, expected) in cases {
            assert_eq!(tokens(&vocabulary), expected);
            assert_eq!((vocabulary.len(), vocabulary.is_empty()), (expected.len(), expected.len() == 2));
            for (id, token) in (0..).zip(expected) {
                assert_eq!((vocabulary.id(token), vocabulary.token(id)), (Some(id), Some(*token)));
            }
            assert_eq!((vocabulary.id("none such"), vocabulary.token(99)), (None, None));
        }
    }

    #[test]
    fn text_survives_encoding() -> Result<()> {
        let (chars, words) = (Vocabulary::chars("hello, wörld"), Vocabulary::words("to be or not to be", 1));
        let cases: [(&Vocabulary, &str, &[u32], &str); 5] = [
            (&chars, "wöw", &[10, 11, 10], "wöw"),
            (&chars, "heX", &[6, 5, UNK], "he\u{FFFD}"),
            (&words, " not \n to\tbe ", &[4, 3, 2], "not to be"),
            (&words, "to err", &[3, UNK], "to <unk>"),
            (&words, "", &[], ""),
        ];
        for (vocabulary, text, ids, decoded) in cases {
            assert_eq!(vocabulary.encode(text), ids, "{text:?}");
            assert_eq!(vocabulary.decode(ids)?, decoded);
            let padded = [&[PAD], ids, &[PAD, PAD]].concat();
            assert_eq!(vocabulary.decode(&padded)?, decoded);
        }
        assert_eq!(words.decode(&[3, PAD, 2])?, "to be");
        let error = words.decode(&[2, 6, 9]).map_err(|error| error.to_string());
        let text = "Vocabulary.decode: an id is 6, expected less than 6, the length of the vocabulary";
        assert_eq!(error, Err(text.to_string()));
        Ok(())
    }

    #[test]
    fn json_gives_the_same_vocabulary() -> Result<()> {
        assert_eq!(Vocabulary::words("b a b", 1).to_json(), r#"{"kind":"words","tokens":["","<unk>","b","a"]}"#);
        for vocabulary in [Vocabulary::chars("a \"\\\n\0é𝄞"), Vocabulary::words("x y \" y", 1), Vocabulary::words("", 1)] {
            let read = Vocabulary::from_json(&vocabulary.to_json())?;
            assert_eq!(read, vocabulary);
            assert_eq!(read.encode("\"y é"), vocabulary.encode("\"y é"));
        }
        Ok(())
    }

    #[test]
    fn bad_json_is_refused() {
        for (json, text) in [
            (r#"{"kind":"bytes","tokens":[]}"#, "unknown variant `bytes`, expected `chars` or `words` at line 1 column 15"),
            (r#"{"kind":"words"}"#, "missing field `tokens` at line 1 column 16"),
            (r#"{"kind":"words","tokens":[],"size":0}"#, "unknown field `size`, expected `kind` or `tokens` at line 1 column 34"),
            (r#"{"kind":"words","tokens":[""]}"#, "tokens has shape [1], expected at least [2]"),
            (r#"{"kind":"words","tokens":["","unk"]}"#, r#"the first tokens are ["", "unk"], expected ["", "<unk>"]"#),
            (r#"{"kind":"words","tokens":["","<unk>","a b"]}"#, r#"a token is "a b", expected one word"#),
            (r#"{"kind":"words","tokens":["","<unk>"," a"]}"#, r#"a token is " a", expected one word"#),
            (r#"{"kind":"words","tokens":["","<unk>",""]}"#, r#"a token is "", expected one word"#),
            (r#"{"kind":"chars","tokens":["","\ufffd","ab"]}"#, r#"a token is "ab", expected one character"#),
            (r#"{"kind":"chars","tokens":["","\ufffd","a","b","a"]}"#, r#"token "a" stands there more than once, expected once"#),
            (r#"{"kind":"words","tokens":["","<unk>","<unk>"]}"#, r#"token "<unk>" stands there more than once, expected once"#),
        ] {
            let error = Vocabulary::from_json(json).map_err(|error| (error.kind(), error.to_string()));
            assert_eq!(error, Err((ErrorKind::Format, format!("Vocabulary.from_json: {text}"))));
        }
    }
}
