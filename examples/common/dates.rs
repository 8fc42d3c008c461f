//! An endless task for sequence-to-sequence models: a date as people write it, and the same date as ISO 8601 has it.
//!
//! Every text means one date. Where custom differs from country to country, here one rule holds: of three numbers with the
//! year last, dots separate day, month, year (3.12.2021) and slashes month, day, year (12/3/2021); with the year first comes
//! the month, then the day. A year of two digits stands beside its century, counted as calendars count it (the 20th ends
//! with 2000), or beside its hundred years ('00 (1900s) is 1900).

use gatefold::Rng;
use gatefold::data::Vocabulary;
use jiff::{ToSpan, civil::Date};

/// Stands before an ISO date for a decoder to begin with.
pub const START: char = '<';
/// Stands after an ISO date for a decoder to end with.
pub const END: char = '>';

const FIRST: Date = Date::constant(1900, 1, 1);
/// Up to the end of 2099.
const DAYS: usize = 73_049;

/// The ways to write a date: directives of strftime, and in braces, by an example, what strftime does not know.
const FORMS: [&str; 38] = [
    "%-d %B %Y",
    "%B %-d, %Y",
    "%B %-d %Y",
    "{3rd} %B %Y",
    "%B {3rd}, %Y",
    "the {3rd} of %B %Y",
    "the {third} of %B %Y",
    "%B the {third}, %Y",
    "the {3rd} day of %B, %Y",
    "%B %-d in the year %Y",
    "%A, %-d %B %Y",
    "%A, %B %-d, %Y",
    "%A the {3rd} of %B, %Y",
    "%A, the {third} of %B %Y",
    "%a %-d %b %Y",
    "%a, %b {3rd}, %Y",
    "%b %-d %Y",
    "%-d %b. %Y",
    "%d-%b-%Y",
    "%d%b%Y",
    "%Y %b %d",
    "%Y, %B {3rd}",
    "%Y.%m.%d",
    "%Y/%m/%d",
    "%Y%m%d",
    "%d.%m.%Y",
    "%-d.%-m.%Y",
    "%-d.{XII}.%Y",
    "%m/%d/%Y",
    "%-m/%-d/%Y",
    "day %-d of month %-m of %Y",
    "year %Y, month %-m, day %-d",
    "day %-j of %Y",
    "%Y-%j",
    "{3rd} %b. '%y ({20th} century)",
    "%-d %B '%y (%C00s)",
    "%-d %B {twenty twenty-one}",
    "the {third} of %B, {twenty twenty-one}",
];

/// How a text's letters are written.
const CASES: [fn(String) -> String; 3] = [|text| text, |text| text.to_lowercase(), |text| text.to_uppercase()];

/// The characters of all texts, apart from those of the ISO dates.
const SOURCE: &str = " '(),-./0123456789ABCDEFGHIJLMNOPRSTUVWXYabcdefghijlmnoprstuvwxy";

/// Dates from 1900-01-01 to 2099-12-31.
pub struct DateTask;

impl DateTask {
    /// A random date, written in a random way, and its ISO form: `("March 3rd, 2021", "2021-03-03")`.
    pub fn pair(rng: &mut Rng) -> (String, String) {
        let date = FIRST + (rng.below(DAYS) as i64).days();
        let (form, case) = (FORMS[rng.below(FORMS.len())], CASES[rng.below(CASES.len())]);
        (case(write(date, form)), date.to_string())
    }

    /// The characters of the texts.
    pub fn source_vocabulary() -> Vocabulary {
        Vocabulary::chars(SOURCE)
    }

    /// The characters of ISO dates, [`START`] and [`END`].
    pub fn target_vocabulary() -> Vocabulary {
        Vocabulary::chars(&format!("0123456789-{START}{END}"))
    }
}

fn write(date: Date, form: &str) -> String {
    let (year, day) = (date.year() as usize, date.day() as usize);
    date.strftime(form)
        .to_string()
        .replace("{3rd}", &ordinal(day))
        .replace("{third}", ORDINALS[day - 1])
        .replace("{XII}", ROMAN[date.month() as usize - 1])
        .replace("{20th}", &ordinal(year.div_ceil(100)))
        .replace("{twenty twenty-one}", &year_in_words(year))
}

/// `1st`, `22nd`, `13th`.
fn ordinal(number: usize) -> String {
    let ending = match (number / 10 % 10, number % 10) {
        (1, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

/// A year from 1900 to 2099, as it is spoken.
fn year_in_words(year: usize) -> String {
    match (year / 100, year % 100) {
        (20, 0) => "two thousand".into(),
        (20, rest @ 1..10) => format!("two thousand and {}", in_words(rest)),
        (hundreds, 0) => format!("{} hundred", in_words(hundreds)),
        (hundreds, rest @ 1..10) => format!("{} oh {}", in_words(hundreds), in_words(rest)),
        (hundreds, rest) => format!("{} {}", in_words(hundreds), in_words(rest)),
    }
}

/// A number from 1 to 99.
fn in_words(number: usize) -> String {
    match (number / 10, number % 10) {
        (0 | 1, _) => NUMBERS[number - 1].into(),
        (tens, 0) => TENS[tens - 2].into(),
        (tens, ones) => format!("{}-{}", TENS[tens - 2], NUMBERS[ones - 1]),
    }
}

const ROMAN: [&str; 12] = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"];
const NUMBERS: [&str; 19] = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
const TENS: [&str; 8] = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
const ORDINALS: [&str; 31] = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
    "twenty-first",
    "twenty-second",
    "twenty-third",
    "twenty-fourth",
    "twenty-fifth",
    "twenty-sixth",
    "twenty-seventh",
    "twenty-eighth",
    "twenty-ninth",
    "thirtieth",
    "thirty-first",
];

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};
    use std::hash::{DefaultHasher, Hash, Hasher};

    use gatefold::data::{PAD, UNK};

    use super::*;

    fn days() -> impl Iterator<Item = Date> {
        FIRST.series(1.day()).take(DAYS)
    }

    #[test]
    fn every_form_says_the_date() {
        let written = |year, month, day| FORMS.map(|form| write(Date::constant(year, month, day), form));
        let expected = [
            "3 March 2021",
            "March 3, 2021",
            "March 3 2021",
            "3rd March 2021",
            "March 3rd, 2021",
            "the 3rd of March 2021",
            "the third of March 2021",
            "March the third, 2021",
            "the 3rd day of March, 2021",
            "March 3 in the year 2021",
            "Wednesday, 3 March 2021",
            "Wednesday, March 3, 2021",
            "Wednesday the 3rd of March, 2021",
            "Wednesday, the third of March 2021",
            "Wed 3 Mar 2021",
            "Wed, Mar 3rd, 2021",
            "Mar 3 2021",
            "3 Mar. 2021",
            "03-Mar-2021",
            "03Mar2021",
            "2021 Mar 03",
            "2021, March 3rd",
            "2021.03.03",
            "2021/03/03",
            "20210303",
            "03.03.2021",
            "3.3.2021",
            "3.III.2021",
            "03/03/2021",
            "3/3/2021",
            "day 3 of month 3 of 2021",
            "year 2021, month 3, day 3",
            "day 62 of 2021",
            "2021-062",
            "3rd Mar. '21 (21st century)",
            "3 March '21 (2000s)",
            "3 March twenty twenty-one",
            "the third of March, twenty twenty-one",
        ];
        assert_eq!(written(2021, 3, 3), expected);
        // Day and month in their places, and years that are spoken in their own ways.
        let some = |year, month, day| -> Vec<String> { written(year, month, day)[25..].to_vec() };
        let expected = [
            "12.09.1900",
            "12.9.1900",
            "12.IX.1900",
            "09/12/1900",
            "9/12/1900",
            "day 12 of month 9 of 1900",
            "year 1900, month 9, day 12",
            "day 255 of 1900",
            "1900-255",
            "12th Sep. '00 (19th century)",
            "12 September '00 (1900s)",
            "12 September nineteen hundred",
            "the twelfth of September, nineteen hundred",
        ];
        assert_eq!(some(1900, 9, 12), expected);
        let expected = [
            "31.12.2000",
            "31.12.2000",
            "31.XII.2000",
            "12/31/2000",
            "12/31/2000",
            "day 31 of month 12 of 2000",
            "year 2000, month 12, day 31",
            "day 366 of 2000",
            "2000-366",
            "31st Dec. '00 (20th century)",
            "31 December '00 (2000s)",
            "31 December two thousand",
            "the thirty-first of December, two thousand",
        ];
        assert_eq!(some(2000, 12, 31), expected);
        for (year, words) in [
            (1905, "nineteen oh five"),
            (1910, "nineteen ten"),
            (1919, "nineteen nineteen"),
            (1999, "nineteen ninety-nine"),
            (2001, "two thousand and one"),
            (2012, "twenty twelve"),
            (2040, "twenty forty"),
            (2099, "twenty ninety-nine"),
        ] {
            assert_eq!(year_in_words(year), words);
        }
        let ordinals = [1, 2, 3, 4, 10, 11, 12, 13, 19, 20, 21, 22, 23, 30, 31].map(ordinal);
        let expected =
            ["1st", "2nd", "3rd", "4th", "10th", "11th", "12th", "13th", "19th", "20th", "21st", "22nd", "23rd", "30th", "31st"];
        assert_eq!(ordinals, expected);
    }

    #[test]
    fn the_calendar_is_counted_right() {
        // By hand: 1 January 1900 was a Monday.
        const WEEK: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
        let (mut year, mut month, mut day, mut of_year) = (1900, 1, 1, 1);
        for (index, date) in days().enumerate() {
            let weekday = WEEK[index % 7];
            assert_eq!(date.to_string(), format!("{year}-{month:02}-{day:02}"));
            let (long, short) = (write(date, FORMS[10]), write(date, FORMS[14]));
            assert!(long.starts_with(&format!("{weekday}, {day} ")), "{date}: {long}");
            assert!(short.starts_with(&format!("{} {day} ", &weekday[..3])), "{date}: {short}");
            assert_eq!(write(date, FORMS[32]), format!("day {of_year} of {year}"));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = match month {
                2 => 28 + u32::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (day, of_year) = (day + 1, of_year + 1);
            if day > last {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (year, month, of_year) = (year + 1, 1, 1);
            }
        }
        assert_eq!((year, month, day), (2100, 1, 1));
    }

    #[test]
    fn no_text_means_two_dates() {
        // Letter case does not tell two dates apart either. A hash of 64 bits stands for its text.
        let mut dates: HashMap<u64, Date> = HashMap::new();
        for (date, form) in days().flat_map(|date| FORMS.map(|form| (date, form))) {
            let text = write(date, form).to_lowercase();
            let mut hash = DefaultHasher::new();
            text.hash(&mut hash);
            let other = *dates.entry(hash.finish()).or_insert(date);
            assert_eq!(other, date, "{text}");
        }
    }

    #[test]
    fn draws_reach_everything() -> gatefold::Result<()> {
        let (source, target) = (DateTask::source_vocabulary(), DateTask::target_vocabulary());
        let (mut rng, mut meant) = (Rng::seed(1), HashMap::new());
        let (mut characters, mut years, mut ways) = (BTreeSet::new(), BTreeSet::new(), [[0; CASES.len()]; FORMS.len()]);
        for index in 0..200_000 {
            let (text, iso) = DateTask::pair(&mut rng);
            let date: Date = iso.parse().expect("an ISO date");
            assert!((1900..2100).contains(&date.year()) && iso.len() == 10 && date.to_string() == iso, "{iso}");
            // All pairs of forms and cases that give this text; looking is slow, so only at some draws.
            if index % 20 == 0 {
                let mut found = false;
                for (counts, form) in ways.iter_mut().zip(FORMS) {
                    for (count, case) in counts.iter_mut().zip(CASES) {
                        let same = case(write(date, form)) == text;
                        *count += usize::from(same);
                        found |= same;
                    }
                }
                assert!(found, "{text:?} is no way to write {iso}");
            }
            let framed = target.encode(&format!("{START}{iso}{END}"));
            assert!(!framed.contains(&UNK) && !framed.contains(&PAD) && !source.encode(&text).contains(&UNK), "{text} {iso}");
            characters.extend(text.chars());
            years.insert(date.year());
            let other = meant.entry(text).or_insert_with(|| iso.clone());
            assert_eq!(*other, iso);
        }
        assert!(ways.iter().flatten().all(|count| *count > 20), "{ways:?}");
        assert_eq!(years.len(), 200);
        assert_eq!(characters.iter().collect::<String>(), SOURCE);
        assert_eq!((source.len(), target.len()), (SOURCE.chars().count() + 2, 15));
        Ok(())
    }
}
