//! Files of a folder that are replaced together, or not at all.
//!
//! Each is written beside its place and brought to the disk first. A single one then takes its place in one step. Where
//! several change, the configuration that is there goes away before the first of them and the new one comes last: a
//! process that dies in between leaves a folder without a configuration, which nobody loads, PEFT neither, rather than
//! an old configuration with new tensors. What was there is then still beside its place, in files whose names begin with
//! a dot.

use super::{CONFIG_FILE, failed};
use crate::error::{Code, Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Files on their way.
pub struct Replacement {
    folder: PathBuf,
    /// Tells the files of this call from any other's.
    mark: String,
    staged: Vec<&'static str>,
}

impl Replacement {
    /// Begins, and makes the folder if it is not there.
    pub fn new(folder: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(folder).map_err(|e| failed(folder, "making", &e))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mark = format!("{}-{now:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Ok(Self { folder: folder.to_owned(), mark, staged: Vec::new() })
    }

    /// Writes a file beside its place.
    pub fn stage(&mut self, name: &'static str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        if fs::symlink_metadata(self.folder.join(name)).is_ok_and(|there| there.is_dir()) {
            let place = self.folder.join(name);
            return Err(Error::new(Code::Io, format!("{}: found a folder, expected a file or none", place.display())));
        }
        let path = self.beside(name, "new");
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|e| failed(&path, "making", &e))?;
        self.staged.push(name);
        let mut buffer = BufWriter::with_capacity(1 << 18, file);
        let written = write(&mut buffer).and_then(|()| buffer.flush()).and_then(|()| buffer.get_ref().sync_all());
        written.map_err(|e| failed(&path, "writing", &e))
    }

    /// Puts the files in their places.
    pub fn commit(self) -> Result<()> {
        let others = self.staged.iter().filter(|name| **name != CONFIG_FILE).count();
        let configured = self.staged.contains(&CONFIG_FILE) && !(others < 2 && self.is_there_already(CONFIG_FILE));
        if configured && others > 0 {
            let mut done = Vec::new();
            self.replace_together(&mut done).map_err(|error| self.restore(&done, error))?;
            for name in &self.staged {
                // A copy that stays does no harm.
                let _ = fs::remove_file(self.beside(name, "old"));
            }
        } else {
            for name in self.staged.iter().filter(|name| configured || **name != CONFIG_FILE) {
                self.install(name)?;
            }
        }
        self.sync()
    }

    fn replace_together(&self, done: &mut Vec<Done>) -> Result<()> {
        self.put_aside(CONFIG_FILE, done)?;
        self.sync()?;
        for name in self.staged.iter().filter(|name| **name != CONFIG_FILE) {
            self.put_aside(name, done)?;
            self.install(name)?;
            done.push(Done::Installed(name));
        }
        self.sync()?;
        self.install(CONFIG_FILE)
    }

    fn put_aside(&self, name: &'static str, done: &mut Vec<Done>) -> Result<()> {
        match fs::rename(self.folder.join(name), self.beside(name, "old")) {
            Ok(()) => done.push(Done::PutAside(name)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(&self.folder.join(name), "moving", &e)),
        }
        Ok(())
    }

    fn install(&self, name: &str) -> Result<()> {
        let place = self.folder.join(name);
        fs::rename(self.beside(name, "new"), &place).map_err(|e| failed(&place, "replacing", &e))
    }

    /// Undoes what was done before a failure.
    fn restore(&self, done: &[Done], error: Error) -> Error {
        for step in done.iter().rev() {
            let undone = match step {
                Done::Installed(name) => fs::remove_file(self.folder.join(name)),
                Done::PutAside(name) => fs::rename(self.beside(name, "old"), self.folder.join(name)),
            };
            if let Err(e) = undone {
                let text =
                    format!("the files of {} are undefined: {}; then: {e}", self.folder.display(), error.message);
                return Error::new(Code::Incomplete, text);
            }
        }
        error
    }

    /// Brings the folder's list of names to the disk. Where a file system cannot, the files are as safe as it makes them.
    fn sync(&self) -> Result<()> {
        let synced = File::open(&self.folder).and_then(|folder| folder.sync_all());
        match synced {
            Err(e) if ![io::ErrorKind::InvalidInput, io::ErrorKind::Unsupported].contains(&e.kind()) => {
                Err(failed(&self.folder, "syncing", &e))
            }
            _ => Ok(()),
        }
    }

    /// Whether a file holds already what is to replace it.
    fn is_there_already(&self, name: &str) -> bool {
        let same = || {
            let [new, old] = [self.beside(name, "new"), self.folder.join(name)];
            let [there, other] = [fs::metadata(&new)?, fs::metadata(&old)?];
            io::Result::Ok(other.is_file() && there.len() == other.len() && fs::read(new)? == fs::read(old)?)
        };
        same().unwrap_or(false)
    }

    fn beside(&self, name: &str, kind: &str) -> PathBuf {
        self.folder.join(format!(".{name}.{}.{kind}", self.mark))
    }
}

enum Done {
    PutAside(&'static str),
    Installed(&'static str),
}

impl Drop for Replacement {
    fn drop(&mut self) {
        for name in &self.staged {
            // It is gone where it was put in its place.
            let _ = fs::remove_file(self.beside(name, "new"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ADAPTER_FILE, STATE_FILE};
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("adalora-replace-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&folder);
            Self(folder)
        }

        fn stage(&self, files: &[(&'static str, &str)]) -> Replacement {
            let mut replacement = Replacement::new(&self.0).unwrap();
            for (name, content) in files {
                replacement.stage(name, |file| file.write_all(content.as_bytes())).unwrap();
            }
            replacement
        }

        fn content(&self) -> Vec<(String, String)> {
            let read = |entry: fs::DirEntry| {
                (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap())
            };
            let mut content: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| read(entry.unwrap())).collect();
            content.sort();
            content
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const ALL: [&str; 3] = [STATE_FILE, ADAPTER_FILE, CONFIG_FILE];

    #[test]
    fn a_failure_at_any_file_restores_all() {
        for is_there in [true, false] {
            let folder = Folder::new(if is_there { "there" } else { "new" });
            if is_there {
                folder.stage(&ALL.map(|name| (name, "old"))).commit().unwrap();
            }
            fs::create_dir_all(&folder.0).unwrap();
            let before = folder.content();
            assert_eq!(before.len(), if is_there { 3 } else { 0 });
            for lost in ALL {
                let replacement = folder.stage(&ALL.map(|name| (name, "new")));
                fs::remove_file(replacement.beside(lost, "new")).unwrap();
                assert_eq!(replacement.commit().unwrap_err().code, Code::NotFound);
                assert_eq!(folder.content(), before);
            }
            folder.stage(&ALL.map(|name| (name, "new"))).commit().unwrap();
            assert!(folder.content().iter().all(|(_, content)| content == "new"));
        }
    }

    #[test]
    fn what_is_not_put_in_place_goes_away() {
        let folder = Folder::new("dropped");
        folder.stage(&[(CONFIG_FILE, "old")]).commit().unwrap();
        drop(folder.stage(&[(CONFIG_FILE, "new"), (ADAPTER_FILE, "new")]));
        assert_eq!(folder.content(), [(CONFIG_FILE.to_owned(), "old".to_owned())]);
    }

    /// A process may end between any two steps: there is never a configuration beside tensors that are not its own.
    #[test]
    fn no_configuration_is_there_while_others_change() {
        let folder = Folder::new("between");
        folder.stage(&ALL.map(|name| (name, "old"))).commit().unwrap();
        let replacement = folder.stage(&ALL.map(|name| (name, "new")));
        fs::remove_file(replacement.beside(CONFIG_FILE, "new")).unwrap();
        let mut done = Vec::new();
        replacement.replace_together(&mut done).unwrap_err();
        // As it would be left: the new tensors, the old files beside their places, no configuration.
        let content = folder.content();
        let names: Vec<&str> = content.iter().map(|(name, _)| name.as_str()).filter(|n| !n.starts_with('.')).collect();
        assert_eq!(names, [ADAPTER_FILE, STATE_FILE]);
        assert_eq!(content.iter().filter(|(name, text)| name.ends_with(".old") && text == "old").count(), 3);
    }

    #[test]
    fn the_same_configuration_stays_where_it_is() {
        use std::os::unix::fs::MetadataExt;
        let folder = Folder::new("same");
        folder.stage(&[(ADAPTER_FILE, "old"), (CONFIG_FILE, "{}")]).commit().unwrap();
        let inode = |name| fs::metadata(folder.0.join(name)).unwrap().ino();
        let before = [ADAPTER_FILE, CONFIG_FILE].map(inode);
        folder.stage(&[(ADAPTER_FILE, "new"), (CONFIG_FILE, "{}")]).commit().unwrap();
        let after = [ADAPTER_FILE, CONFIG_FILE].map(inode);
        assert!(before[0] != after[0] && before[1] == after[1]);
        assert_eq!(folder.content().len(), 2);
    }
}
