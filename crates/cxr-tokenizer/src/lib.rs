//! The tokenizer of CLIP ViT-L/14, which is Stable Diffusion 1.x's, with its vocabulary embedded.
//!
//! ```
//! use cxr_tokenizer::ClipTokenizer;
//!
//! let tokenizer = ClipTokenizer::embedded();
//! let tokens = tokenizer.encode("a photo of a cat");
//! assert_eq!(tokens.ids[..7], [49406, 320, 1125, 539, 320, 2368, 49407]);
//! assert_eq!(tokens.ids.len(), 77);
//! assert!(!tokens.truncated);
//! ```

mod clip;
pub mod vocabulary;

pub use clip::{ClipTokenizer, LENGTH, TokenizerError, Tokens};
