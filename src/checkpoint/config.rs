//! `adapter_config.json`: what the library reads of it, and what it writes into one.

use super::adapters::Source;
use super::{corrupt, misfit, read_whole};
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Bytes of a configuration, at most.
pub(crate) const MOST_BYTES: usize = 16 << 20;
/// PEFT's default where the field is missing.
const LORA_ALPHA: f64 = 8.0;

/// The text of a configuration.
pub fn read(path: &Path) -> Result<String> {
    String::from_utf8(read_whole(path, MOST_BYTES)?).map_err(|_| corrupt(path, "what is no UTF-8", "JSON"))
}

/// What says how the tensors are to be read.
pub struct Config {
    /// Triplets of every adapter at creation.
    pub init_r: usize,
    /// Which of them are in the file, by the module's path, where not all are.
    pub rank_pattern: BTreeMap<String, Vec<bool>>,
}

/// Fields as they stand; all others are passed over.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    peft_type: Option<&'a RawValue>,
    #[serde(borrow)]
    init_r: Option<&'a RawValue>,
    #[serde(borrow)]
    rank_pattern: Option<&'a RawValue>,
}

impl Config {
    /// Reads the text of a file.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        if !text.trim_start().starts_with('{') {
            return Err(corrupt(path, "what is not", "a JSON object"));
        }
        let fields: Fields = serde_json::from_str(text)
            .map_err(|e| corrupt(path, format_args!("what is not ({e})"), "a JSON object"))?;
        let field = |name: &str, raw: Option<&RawValue>, expected: &str| {
            let found = raw.map_or("none".into(), |raw| shortened(raw.get()));
            Error::argument(format_args!("{}: {name}", path.display()), found, expected)
        };
        let parsed = |raw: Option<&RawValue>| raw.map_or("null", RawValue::get).to_owned();
        if parsed(fields.peft_type) != "\"ADALORA\"" {
            return Err(field("peft_type", fields.peft_type, "\"ADALORA\""));
        }
        let init_r = serde_json::from_str(&parsed(fields.init_r))
            .map_err(|_| field("init_r", fields.init_r, "an integer, 0 or more"))?;
        let by_name: Option<BTreeMap<String, Vec<bool>>> = serde_json::from_str(&parsed(fields.rank_pattern))
            .map_err(|_| field("rank_pattern", fields.rank_pattern, "lists of true and false by name, or null"))?;
        let mut rank_pattern = BTreeMap::new();
        for (name, kept) in by_name.unwrap_or_default() {
            // PEFT's names end in the adapter's own, or not.
            let Some((module, _)) = name.rsplit_once(".lora_E") else {
                return Err(misfit(path, format_args!("{name:?} in rank_pattern"), "names of lora_E"));
            };
            if kept.len() != init_r {
                let place = format!("{}: rank_pattern[{name:?}]", path.display());
                return Err(Error::argument(place, kept.len(), format_args!("init_r, {init_r} values")));
            }
            if rank_pattern.insert(module.to_owned(), kept).is_some() {
                return Err(misfit(path, format_args!("{name:?} twice in rank_pattern"), "each module once"));
            }
        }
        Ok(Self { init_r, rank_pattern })
    }
}

/// As much of a text as a message has room for.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The caller's configuration, with what only its adapters can say.
struct Given {
    fields: Map<String, Value>,
    init_r: usize,
}

impl Given {
    fn parse(text: &str, adapters: &[Source<'_>]) -> Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| Error::argument("desc.config", format_args!("what is not ({e})"), "a JSON object"))?;
        let field = |name: &str, expected: &str| {
            let found = fields.get(name).map_or("none".into(), |value| shortened(&value.to_string()));
            Error::argument(format_args!("desc.config: {name}"), found, expected)
        };
        if fields.get("peft_type").is_some_and(|value| value != "ADALORA") {
            return Err(field("peft_type", "\"ADALORA\""));
        }
        let init_r = match (fields.get("init_r"), adapters.first()) {
            (Some(value), _) => value.as_u64().and_then(|r| usize::try_from(r).ok()),
            (None, first) => first.map(|adapter| adapter.rank),
        };
        let init_r = init_r.ok_or_else(|| field("init_r", "an integer, 0 or more"))?;
        if let Some((i, adapter)) = adapters.iter().enumerate().find(|(_, adapter)| adapter.rank != init_r) {
            let name = format!("adapters[{i}].rank");
            return Err(Error::argument(
                name,
                adapter.rank,
                format_args!("{init_r}: the files know one init_r for all"),
            ));
        }
        if fields.get("lora_alpha").is_some_and(|value| value.as_f64().is_none_or(|alpha| alpha < 0.0)) {
            return Err(field("lora_alpha", "a number, 0 or more"));
        }
        Ok(Self { fields, init_r })
    }

    /// The numerator of the scaling.
    fn alpha(&self) -> f64 {
        match self.fields.get("lora_alpha").map_or(Some(LORA_ALPHA), Value::as_f64) {
            Some(alpha) if alpha > 0.0 => alpha,
            _ => self.init_r as f64,
        }
    }

    fn set(&mut self, name: &str, value: Value) {
        self.fields.insert(name.to_owned(), value);
    }

    fn set_default(&mut self, name: &str, value: Value) {
        self.fields.entry(name).or_insert(value);
    }

    /// The file's text, as PEFT lays it out.
    fn text(&self) -> String {
        format!("{:#}\n", Value::Object(self.fields.clone()))
    }
}

fn names(adapters: &[Source<'_>]) -> Value {
    adapters.iter().map(|adapter| adapter.name.as_str()).collect()
}

/// The configuration to write: the caller's text, with the rank pattern, and with what is missing and the adapters tell.
pub fn for_adapters(text: &str, adapters: &[Source<'_>]) -> Result<String> {
    let mut given = Given::parse(text, adapters)?;
    let init_r = given.init_r;
    let pattern = adapters.iter().any(|adapter| adapter.pattern.is_some()).then(|| {
        let kept = |adapter: &Source<'_>| match adapter.pattern {
            Some(pattern) => pattern.iter().map(|kept| Value::Bool(*kept != 0)).collect(),
            None => Value::Array(vec![Value::Bool(true); init_r]),
        };
        adapters.iter().map(|adapter| (format!("{}.lora_E", adapter.name), kept(adapter))).collect::<Map<_, _>>()
    });
    given.set("peft_type", json!("ADALORA"));
    given.set("init_r", json!(init_r));
    given.set("rank_pattern", json!(pattern));
    given.set_default("target_modules", names(adapters));
    // 0 stands for the rank, which PEFT takes from what is left of a cut adapter.
    if given.fields.get("lora_alpha").is_some_and(|value| value.as_f64() == Some(0.0)) {
        given.set("lora_alpha", json!(init_r));
    }
    Ok(given.text())
}

/// The configuration of the same adapters as plain LoRA, all of rank `r`, which multiplies by 1; and the multiplier that
/// the adapters had.
pub fn for_lora(text: &str, adapters: &[Source<'_>], r: usize) -> Result<(String, f64)> {
    const ADALORAS_OWN: [&str; 9] =
        ["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"];
    let mut given = Given::parse(text, adapters)?;
    let scaling = crate::adapter::scaling(given.alpha(), given.init_r);
    for name in ADALORAS_OWN {
        given.fields.remove(name);
    }
    given.set("peft_type", json!("LORA"));
    given.set("r", json!(r));
    given.set("lora_alpha", json!(r));
    for (name, value) in [("rank_pattern", json!({})), ("alpha_pattern", json!({})), ("use_rslora", json!(false))] {
        given.set(name, value);
    }
    given.set_default("target_modules", names(adapters));
    Ok((given.text(), scaling))
}
